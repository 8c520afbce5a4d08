"""An operation: a route together with what the OpenAPI document says of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from supervisor.errors import Problem
from supervisor.guards import bearer_key
from supervisor.requests import BodyType, decode
from supervisor.service import Service
from supervisor.storage import Storage

Endpoint = Callable[[Request], Awaitable[Response]]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`errors` are codes of the catalogue; `query` maps names to JSON Schemas."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: type[msgspec.Struct] | None = None
    example: dict[str, Any] | None = None
    """A body that works where there is a default checkpoint."""
    files: dict[str, dict[str, Any]] | None = None
    """JSON Schemas of files; then the body is a multipart form with these beside the fields."""
    streams: bool = False
    """May answer with events."""
    may_wait: bool = False
    """May answer 202 and go on."""
    status: int = 200
    answer: type[msgspec.Struct] | dict[str, Any] | None = None
    """One of answers.ALL, or a JSON Schema."""
    media_type: str = "application/json"
    query: dict[str, dict[str, Any]] | None = None
    headers: dict[str, dict[str, Any]] | None = None
    errors: tuple[str, ...] = ()
    tag: str = "server"


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def storage_of(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


def json_response(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def body_of(request: Request, kind: type[BodyType]) -> BodyType:
    """The request's JSON body. Raises Problem."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        detail = f"cannot read a body of type {media_type[:100]}: send application/json"
        raise Problem("unsupported_media_type", detail)
    return decode(await request.body(), kind)


def request_id_of(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))


def caller_of(request: Request) -> str:
    """Who asks: the key if there is one, else the address."""
    key = bearer_key(request.scope)
    return f"key:{hash(key)}" if key else f"address:{request.client.host if request.client else ''}"
