"""GET /metrics: the server's figures as Prometheus reads them."""

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

from supervisor.metrics import Metrics
from supervisor.operations import Operation


async def show(request: Request) -> Response:
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


OPERATIONS = [
    Operation(method="GET", path="/metrics", endpoint=show, media_type="text/plain",
              answer={"type": "string"}, summary="Figures of requests, jobs, workers and devices "
                                                 "for Prometheus"),
]  # fmt: skip
