"""Health, readiness, placement and statistics, for operators and their probes.

No answer here waits for a worker.
"""

from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from ipc.messages import Resident
from supervisor import VERSION, answers, monitoring
from supervisor.errors import Problem
from supervisor.operations import Operation, json_response, service_of, storage_of
from supervisor.worker import Worker


async def health(request: Request) -> Response:
    return json_response({"status": "ok", "version": VERSION})


async def ready(request: Request) -> Response:
    fleet = service_of(request).fleet
    if fleet.draining:
        raise Problem("draining", "cannot take new work: the server is stopping", retry_after=30)
    if not fleet.ready_workers():
        states = ", ".join(f"{w.id} is {w.state.value}" for w in fleet.workers.values())
        detail = f"cannot take new work: no worker is ready (worker {states})"
        raise Problem("unavailable", detail, retry_after=1)
    return json_response({"status": "ready", "workers": len(fleet.ready_workers())})


async def placement(request: Request) -> Response:
    fleet = service_of(request).fleet
    planned = list(fleet.planned().values())
    workers = [described(worker, planned.count(worker.id)) for worker in fleet.workers.values()]
    return json_response({"workers": workers})


def described(worker: Worker, queued: int) -> dict[str, Any]:
    return {
        "id": worker.id,
        "device": worker.device,
        "name": worker.name,
        "pid": worker.process.pid if worker.process else None,
        "state": worker.state.value,
        "restarts": worker.restarts,
        "last_exit": worker.last_exit,
        "running": len(worker.running),
        "queued": queued,
        "step_seconds": worker.step_seconds,
        "memory": worker.memory,
        "models": [_model(model) for model in worker.models],
    }


def _model(model: Resident) -> dict[str, Any]:
    """What is resident, without where its file lies."""
    names = ("checkpoint", "family", "vae", "loras", "tier", "bytes", "last_used")
    return {name: getattr(model, name) for name in names}


async def stats(request: Request) -> Response:
    data_dir = service_of(request).settings.data_dir
    quota = storage_of(request).quota
    return json_response(await to_thread.run_sync(monitoring.system_stats, data_dir, quota))


async def restart(request: Request) -> Response:
    fleet = service_of(request).fleet
    if fleet.draining:
        raise Problem("draining", "cannot restart workers: the server is stopping")
    fleet.restart()
    return json_response({"status": "restarting", "workers": len(fleet.workers)}, 202)


OPERATIONS = [
    Operation(method="GET", path="/hc", endpoint=health, answer=answers.Health,
              summary="Says that the supervisor lives"),
    Operation(method="GET", path="/health", endpoint=health, answer=answers.Health,
              summary="Says that the supervisor lives"),
    Operation(method="GET", path="/ready", endpoint=ready, answer=answers.Readiness,
              summary="Says whether new work is taken", errors=("unavailable", "draining")),
    Operation(method="GET", path="/placement", endpoint=placement, answer=answers.Placement,
              summary="The workers, what they do and which models they hold"),
    Operation(method="GET", path="/stats", endpoint=stats, answer=answers.SystemStats,
              summary="Processor, memory, storage, GPUs and packages of this host"),
    Operation(method="POST", path="/restart", endpoint=restart, status=202,
              answer=answers.Restarting,
              summary="Replace the workers one after the other, losing no job",
              errors=("draining",)),
]  # fmt: skip
