"""OpenAI's images and models, for clients that speak nothing else."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import anyio
import msgspec
from anyio import to_thread
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from supervisor import answers, openai_images, openai_pictures
from supervisor.errors import Problem
from supervisor.jobs import Preview
from supervisor.openai_images import EditsBody, EventKind, GenerationsBody, ImagesBody
from supervisor.operations import Operation, body_of, json_response, service_of
from supervisor.problems import openai_body
from supervisor.records import Record
from supervisor.requests import GenerateBody, invalid
from supervisor.routes.generate import (
    CLIENT_LEFT,
    ERRORS,
    HEADERS,
    accept,
    claim_of,
    done_or_cancelled,
)
from supervisor.watching import changes

MAX_FILES = 17
MAX_FIELDS = 50
MAX_FIELD_BYTES = 2**18
OWNER = "image-generation-inference"
MODELS_PATH = "/v1/models/"


async def generations(request: Request) -> Response:
    asked = await body_of(request, GenerationsBody)
    body = openai_images.generate_body(asked, size=asked.chosen_size)
    return await _answered(request, asked, body, "image_generation")


async def edits(request: Request) -> Response:
    asked, images, mask = await _form(request)
    max_pixels = service_of(request).settings.max_image_pixels
    pictures, size = await to_thread.run_sync(
        openai_pictures.prepared, images, mask, asked.chosen_size, max_pixels
    )
    body = openai_images.generate_body(asked, pictures, size)
    return await _answered(request, asked, body, "image_edit")


async def _form(request: Request) -> tuple[EditsBody, list[bytes], bytes | None]:
    """The text fields, the pictures and the mask of a multipart form. Raises Problem."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Problem("unsupported_media_type", "cannot read the body: send multipart/form-data")
    parser = MultiPartParser(
        request.headers, request.stream(),
        max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES,
    )  # fmt: skip
    # The body is in memory as it is, and bounded: no part of it goes to a file.
    parser.spool_max_size = service_of(request).settings.max_body_bytes + 1
    try:
        items = (await parser.parse()).multi_items()
    except (MultiPartException, FormParserError) as error:
        detail = f"cannot read the form: {str(error)[:200]}"
        raise Problem("invalid_request", detail) from None
    return await _sorted(items)


async def _sorted(
    items: list[tuple[str, UploadFile | str]],
) -> tuple[EditsBody, list[bytes], bytes | None]:
    fields: dict[str, str] = {}
    images: list[bytes] = []
    mask: bytes | None = None
    for name, value in items:
        if isinstance(value, str):
            if name in fields:
                raise Problem("invalid_request", f"cannot accept {name[:100]} twice",
                              field=name[:100])  # fmt: skip
            fields[name] = value
        elif name in ("image", "image[]"):
            images.append(await value.read())
        elif name == "mask" and mask is None:
            mask = await value.read()
        else:
            detail = f"cannot accept a file as {name[:100]}: files are image, image[] and mask"
            raise Problem("invalid_request", detail, field=name[:100])
    if not images:
        raise Problem("invalid_request", "cannot edit without a picture: send a file as image",
                      field="image")  # fmt: skip
    try:
        return openai_images.edits_body(fields), images, mask
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(error) from None


async def _answered(
    request: Request, asked: ImagesBody, body: GenerateBody, kind: EventKind
) -> Response:
    if asked.wants_url and service_of(request).settings.image_storage_strategy != "disk":
        raise Problem("not_supported", "cannot give addresses: pictures are not stored on this "
                      "server's disk; use b64_json", field="response_format")  # fmt: skip
    record = await _record(request, asked, body)
    if asked.stream:
        return await _stream(request, record, asked, kind)
    if not await done_or_cancelled(request, record):
        return Response(status_code=CLIENT_LEFT)
    images_url = f"{request.base_url}images/"
    content = await to_thread.run_sync(
        openai_images.answer, record.result(), asked, images_url, int(time.time())
    )
    return Response(content, media_type="application/json")


async def _record(request: Request, asked: ImagesBody, body: GenerateBody) -> Record:
    """A new job, or the one that the idempotency key stands for."""
    if "idempotency-key" not in request.headers:
        return await accept(request, body, None)
    # A form's retry has another boundary, so the key goes with what was understood.
    claim = claim_of(request, msgspec.json.encode([asked, body]))
    known = claim.record if claim else None
    return known or await accept(request, body, claim)


async def _stream(request: Request, record: Record, asked: ImagesBody, kind: EventKind) -> Response:
    """Events; what goes wrong before the first of them is an answer of its own."""
    events = _events(request, record, asked, kind)
    first: bytes | None = None
    failed: Problem | None = None
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(listen)
        try:
            first = await anext(events)
        except Problem as problem:
            failed = problem
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    if first is None:
        return Response(status_code=CLIENT_LEFT)

    async def all_events(first: bytes) -> AsyncIterator[bytes]:
        async with aclosing(events):
            yield first
            try:
                async for event in events:
                    yield event
            except Problem as problem:
                yield openai_images.error_event(openai_body(problem))

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(all_events(first), media_type="text/event-stream", headers=headers)


async def _events(
    request: Request, record: Record, asked: ImagesBody, kind: EventKind
) -> AsyncGenerator[bytes, None]:
    """Raises the Problem that the job ended with; cancels the job when it is closed before."""
    index = 0
    try:
        async with aclosing(changes(record)) as told:
            async for change in told:
                if isinstance(change, Preview):
                    yield openai_images.partial_event(change.image, index, kind, int(time.time()))
                    index += 1
        whole = await to_thread.run_sync(
            openai_images.completed_events, record.result(), asked, kind, int(time.time())
        )
        for event in whole:
            yield event
    finally:
        if not record.done.is_set() and not record.detached:
            service_of(request).cancel(record)


async def list_models(request: Request) -> Response:
    names = await to_thread.run_sync(request.app.state.models.names, "checkpoint")
    return json_response({"object": "list", "data": [_model(name) for name in names]})


async def show_model(request: Request) -> Response:
    name = request.scope["path"].removeprefix(MODELS_PATH)  # the route forgives a line break
    names = await to_thread.run_sync(request.app.state.models.names, "checkpoint")
    if name not in names:
        raise Problem("unknown_model", "cannot find a model of this name", field="model")
    return json_response(_model(name))


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}


FILE = {"type": "string", "contentMediaType": "image/png"}
FILES: dict[str, Any] = {"image": FILE, "image[]": {"type": "array", "items": FILE}, "mask": FILE}
KEY_HEADER = {"Idempotency-Key": HEADERS["Idempotency-Key"]}

OPERATIONS = [
    Operation(method="POST", path="/v1/images/generations", endpoint=generations,
              body=GenerationsBody, answer=answers.OpenaiImages, headers=KEY_HEADER,
              errors=ERRORS, tag="openai", streams=True,
              summary="Generate pictures, as OpenAI's API does"),
    Operation(method="POST", path="/v1/images/edits", endpoint=edits, body=EditsBody,
              files=FILES, answer=answers.OpenaiImages, headers=KEY_HEADER,
              errors=ERRORS, tag="openai", streams=True,
              summary="Change a picture, all of it or where the mask is clear"),
    Operation(method="GET", path="/v1/models", endpoint=list_models, tag="openai",
              answer=answers.OpenaiModels, summary="Checkpoints, as OpenAI lists models"),
    Operation(method="GET", path=MODELS_PATH + "{id:path}", endpoint=show_model, tag="openai",
              answer=answers.OpenaiModel, summary="One checkpoint", errors=("unknown_model",)),
]  # fmt: skip
