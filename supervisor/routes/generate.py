"""POST /generate and /generate/{PipelineClass}: pictures now, as a stream, or later."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pybase64
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from supervisor import answers
from supervisor.errors import Problem
from supervisor.jobs import Change, Loading, Preview, Progress, Queued
from supervisor.operations import (
    Operation,
    body_of,
    caller_of,
    json_response,
    request_id_of,
    service_of,
)
from supervisor.problems import problem_body
from supervisor.records import Claim, Record
from supervisor.requests import GenerateBody
from supervisor.states import JobState
from supervisor.watching import changes, done_or_gone

MAX_KEY = 255
CLIENT_LEFT = 499


async def generate(request: Request) -> Response:
    body = await body_of(request, GenerateBody)
    pipeline = request.path_params.get("pipeline")
    if pipeline is not None:
        if body.pipeline is not None:
            raise Problem("invalid_request", "cannot accept the field pipeline: the address "
                          "names it already", field="pipeline")  # fmt: skip
        body = msgspec.structs.replace(body, pipeline=pipeline)
    claim = claim_of(request, await request.body())
    if claim is not None and claim.record is not None:
        return _answer(claim.record)
    record = await accept(request, body, claim)
    if wants_async(request):
        return accepted(record)
    if wants_events(request):
        return event_stream(request, record)
    return await answer_or_cancel(request, record)


def claim_of(request: Request, body: bytes) -> Claim | None:
    """What the request's idempotency key stands for; None without one. Raises Problem."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY:
        detail = f"cannot use this idempotency key: it has 1 to {MAX_KEY} characters"
        raise Problem("invalid_request", detail, field="Idempotency-Key")
    whole = request.url.path.encode() + b"\n" + body
    return service_of(request).records.claim(caller_of(request), key, whole)


async def accept(request: Request, body: GenerateBody, claim: Claim | None) -> Record:
    """The request as an accepted job. Raises Problem; then its key is free again."""
    service, caller = service_of(request), caller_of(request)
    detached = claim is not None or wants_async(request)
    # Whoever waits for the whole answer learns the job's id from it, too late to look on.
    followed = wants_async(request) or wants_events(request)
    try:
        record = await service.accept(
            body, caller, request_id_of(request), detached=detached, followed=followed
        )
    except BaseException:
        if claim is not None:
            service.records.unclaim(caller, request.headers["idempotency-key"])
        raise
    if claim is not None:
        claim.record = record
    return record


def wants_async(request: Request) -> bool:
    return "respond-async" in request.headers.get("prefer", "")


def wants_events(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")


def accepted(record: Record) -> Response:
    where = f"/jobs/{record.job.id}"
    content = {"id": record.job.id, "status": record.job.state.value, "poll_url": where}
    response = json_response(content, 202)
    response.headers["Location"] = where
    response.headers["Preference-Applied"] = "respond-async"
    return response


def _answer(record: Record) -> Response:
    return Response(record.result(), media_type="application/json")


async def answer_or_cancel(request: Request, record: Record) -> Response:
    """The whole answer; a caller that hangs up first cancels its job."""
    if not await done_or_cancelled(request, record):
        return Response(status_code=CLIENT_LEFT)
    return _answer(record)


async def done_or_cancelled(request: Request, record: Record) -> bool:
    """Waits for the answer; false when the caller hung up, and with that cancelled its job."""
    done = False
    try:
        done = await done_or_gone(record, request.receive)
    finally:
        if not done and not record.detached:
            service_of(request).cancel(record)
    return done


def event_stream(request: Request, record: Record) -> Response:
    async def events() -> AsyncIterator[bytes]:
        try:
            async for change in changes(record):
                yield event(*described(change))
            yield final_event(record, request_id_of(request))
        finally:
            if not record.done.is_set() and not record.detached:
                service_of(request).cancel(record)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def event(name: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def described(change: Change) -> tuple[str, bytes]:
    match change:
        case Queued():
            content: dict[str, Any] = {"position": change.position}
        case Loading():
            content = {"model": change.model, "fraction": change.fraction}
        case Progress():
            content = {"step": change.step, "steps": change.steps, "fraction": change.fraction}
        case Preview():
            content = {"image": pybase64.b64encode_as_string(change.image)}
        case _:
            content = {}
    return type(change).__name__.lower(), msgspec.json.encode(content)


def final_event(record: Record, request_id: str) -> bytes:
    """How it ended, under the name of the state it ended in."""
    if record.problem is None:
        return event("finished", record.answer or b"{}")
    ended = record.job.state if record.job.state is not JobState.FINISHED else JobState.FAILED
    return event(ended.value, msgspec.json.encode(problem_body(record.problem, request_id)))


ERRORS = ("invalid_request", "not_supported", "incompatible_model", "invalid_model",
          "unknown_model", "queue_full", "too_late", "unavailable", "draining", "worker_lost",
          "poison", "generation_failed", "out_of_memory", "storage_full", "deadline_exceeded",
          "cancelled", "batch_id_exists", "key_in_use", "key_reused",
          "unsupported_media_type")  # fmt: skip
EXAMPLE = {"parameters": {"prompt": "a large red circle on a white background", "seed": 7}}
HEADERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {"type": "string", "minLength": 1, "maxLength": MAX_KEY},
    "Prefer": {"type": "string", "examples": ["respond-async"]},
}

OPERATIONS = [
    Operation(method="POST", path="/generate", endpoint=generate, body=GenerateBody,
              example=EXAMPLE,
              summary="Generate pictures; the pipeline follows from the checkpoint and the "
                      "inputs, unless it is named",
              answer=answers.Generated, headers=HEADERS,
              errors=ERRORS, tag="generation", streams=True, may_wait=True),
    Operation(method="POST", path="/generate/{pipeline}", endpoint=generate,
              body=GenerateBody, example=EXAMPLE, summary="Generate pictures with a pipeline class",
              answer=answers.Generated, headers=HEADERS,
              errors=ERRORS, tag="generation", streams=True, may_wait=True),
]  # fmt: skip
