"""The OpenAPI document and Swagger UI, from the installation itself: no network."""

from functools import cache
from importlib.resources import files

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from supervisor.errors import Problem
from supervisor.operations import Operation

ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Image Generation Inference</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", docExpansion: "list",
  defaultModelsExpandDepth: -1, tryItOutEnabled: true, validatorUrl: null,
});
"""


async def page(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "start.js":
        return Response(START, media_type="text/javascript")
    if name not in ASSETS:
        raise Problem("not_found", "cannot find this file")
    return Response(_asset(name), media_type=ASSETS[name])


@cache
def _asset(name: str) -> bytes:
    return files("openapi_ui_bundles.swagger_ui").joinpath("vendor", name).read_bytes()


async def document(request: Request) -> Response:
    """Built on the first request, in a thread: it describes every pipeline."""
    body = await to_thread.run_sync(request.app.state.openapi)
    return Response(body, media_type="application/json")


HTML = {"type": "string"}
OPERATIONS = [
    Operation(method="GET", path="/docs", endpoint=page, media_type="text/html", answer=HTML,
              summary="This interface"),
    Operation(method="GET", path="/docs/{name}", endpoint=asset, media_type="text/javascript",
              answer=HTML, summary="A file of this interface", errors=("not_found",)),
    Operation(method="GET", path="/openapi.json", endpoint=document, answer={"type": "object"},
              summary="This interface as an OpenAPI document"),
]  # fmt: skip
