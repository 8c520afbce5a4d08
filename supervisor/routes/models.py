"""Models by name: what there is, what is loaded, loading and unloading."""

import uuid
from collections.abc import Sequence
from typing import Literal, get_args

import anyio
import msgspec
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from ipc import messages
from supervisor import answers, schedulers
from supervisor.errors import Problem
from supervisor.operations import (
    Endpoint,
    Operation,
    body_of,
    json_response,
    request_id_of,
    service_of,
)
from supervisor.requests import LoadBody, UnloadBody
from supervisor.service import Service
from supervisor.states import WorkerState

Kind = Literal["checkpoint", "vae", "lora", "controlnet"]


def loaded_names(service: Service) -> list[str]:
    workers = service.fleet.workers.values()
    return sorted({model.checkpoint for worker in workers for model in worker.models})


def names_of(kind: Kind) -> Endpoint:
    async def names(request: Request) -> Response:
        loaded = request.query_params.get("loaded", "false").lower()
        if loaded not in ("true", "false") or (loaded == "true" and kind != "checkpoint"):
            raise Problem("invalid_request", "cannot accept loaded: it is true or false, for "
                          "checkpoints only", field="loaded")  # fmt: skip
        if loaded == "true":
            return json_response(loaded_names(service_of(request)))
        models = request.app.state.models
        return json_response(await to_thread.run_sync(models.names, kind))

    return names


async def load(request: Request) -> Response:
    service, body = service_of(request), await body_of(request, LoadBody)
    message = await to_thread.run_sync(
        service.preparation.load,
        body.checkpoint,
        body.vae,
        uuid.uuid4().hex,
        limiter=service.preparing,
    )
    await _on_each(request, message, _chosen(service, body.worker))
    return json_response(loaded_names(service))


async def unload(request: Request) -> Response:
    service, body = service_of(request), await body_of(request, UnloadBody)
    message = _resident(service, body.checkpoint)
    if message is None:
        message = await to_thread.run_sync(
            service.preparation.unload, body.checkpoint, "", limiter=service.preparing
        )
    wanted = _chosen(service, "all" if body.worker is None else body.worker)
    path = message.checkpoint.path
    workers = service.fleet.workers
    holders = [id for id in wanted if id is not None and workers[id].holds(path)]
    await _on_each(request, message, holders)
    return json_response(loaded_names(service))


def _resident(service: Service, name: str) -> messages.Unload | None:
    """For a checkpoint that a worker holds under this name."""
    for worker in service.fleet.workers.values():
        for model in worker.models:
            if model.checkpoint == name:
                known = messages.Model(name=name, path=model.path, family=model.family)
                return messages.Unload(job="", checkpoint=known)
    return None


def _chosen(service: Service, worker: int | str | None) -> list[int | None]:
    """Worker ids; None stands for whichever placement chooses."""
    if worker is None:
        return [None]
    workers = service.fleet.workers
    if worker == "all":
        gone = (WorkerState.QUARANTINED, WorkerState.STOPPED)
        return [id for id, one in workers.items() if one.state not in gone]
    if worker not in workers:
        known = ", ".join(map(str, workers))
        detail = f"cannot find worker {str(worker)[:40]}: there are {known}, or all"
        raise Problem("invalid_request", detail, field="worker")
    return [int(worker)]


async def _on_each(
    request: Request, message: messages.Load | messages.Unload, workers: Sequence[int | None]
) -> None:
    """Carries the message out on each worker at the same time; raises the first problem."""
    service, id = service_of(request), request_id_of(request)
    problems: list[Problem] = []

    async def one(worker: int | None) -> None:
        try:
            numbered = msgspec.structs.replace(message, job=uuid.uuid4().hex)
            await service.carry_out(numbered, id, worker)
        except Problem as problem:
            problems.append(problem)

    async with anyio.create_task_group() as group:
        for worker in workers:
            group.start_soon(one, worker)
    if problems:
        raise problems[0]


async def list_schedulers(request: Request) -> Response:
    return json_response(schedulers.listing())


NAMES = {"type": "array", "items": {"type": "string"}}
MODEL_ERRORS = ("invalid_request", "unknown_model", "incompatible_model", "invalid_model",
                "unavailable", "draining", "out_of_memory", "worker_lost", "poison",
                "deadline_exceeded", "unsupported_media_type", "queue_full",
                "generation_failed")  # fmt: skip
PATHS: dict[Kind, str] = {"checkpoint": "/checkpoints", "vae": "/vae", "lora": "/lora",
                          "controlnet": "/controlnet"}  # fmt: skip

OPERATIONS = [
    *(
        Operation(method="GET", path=PATHS[kind], endpoint=names_of(kind), answer=NAMES,
                  summary=f"Names that can be used as {kind}", tag="models",
                  query={"loaded": {"type": "boolean"}} if kind == "checkpoint" else None,
                  errors=("invalid_request",))
        for kind in get_args(Kind)
    ),
    Operation(method="POST", path="/load/checkpoint", endpoint=load, body=LoadBody, answer=NAMES,
              summary="Load a checkpoint; answers when it is loaded, with all that are",
              tag="models", errors=MODEL_ERRORS),
    Operation(method="POST", path="/unload/checkpoint", endpoint=unload, body=UnloadBody,
              answer=NAMES, summary="Unload a checkpoint; answers with those still loaded",
              tag="models", errors=MODEL_ERRORS),
    Operation(method="GET", path="/schedulers", endpoint=list_schedulers, tag="models",
              summary="Schedulers by class and by A1111 name",
              answer=answers.Schedulers),
]  # fmt: skip
