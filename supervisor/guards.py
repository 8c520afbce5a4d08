"""What every request passes before a route sees it. Plain ASGI, outermost first.

RequestId names the request, BodyGuard reads the whole body within a size and a
time, KeyGuard asks for a key. The body comes before everything that may answer,
because Hypercorn stalls on a large body that a handler leaves unread.
"""

import hmac
import logging
import math
import re
import time
import uuid
from contextvars import ContextVar

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from supervisor.errors import Problem
from supervisor.problems import problem_response

log = logging.getLogger("access")

request_id_of_task: ContextVar[str] = ContextVar("request_id", default="")
OPEN_PATHS = frozenset({"/hc", "/health", "/ready"})


class RequestId:
    """Gives each request an id, returns it, and logs the request's end.

    Nothing that goes wrong in a route leaves here as anything but a problem.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        request_id_of_task.set(id)
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed")
            if not status:
                problem = Problem("internal_error", "cannot answer: the server has a defect")
                await problem_response(problem, scope)(scope, receive, send_with_id)
        finally:
            took = round((time.monotonic() - began) * 1000, 1)
            log.info("request", extra={"method": scope["method"], "path": scope["path"][:200],
                                       "status": status, "milliseconds": took})  # fmt: skip


class BodyGuard:
    """Reads the body, all of it, before the application runs."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await self._read(scope, receive)
        except Problem as problem:
            response = problem_response(problem, scope)
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None when the caller has left. Raises Problem."""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large()
        try:
            with anyio.fail_after(self.timeout_seconds):
                return await self._collect(receive)
        except TimeoutError:
            limit = math.ceil(self.timeout_seconds)
            detail = f"cannot wait longer: the body must arrive within {limit} s"
            raise Problem("body_timeout", detail) from None

    async def _collect(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Problem:
        detail = f"cannot accept the body: it is larger than {self.max_bytes} bytes"
        return Problem("body_too_large", detail)


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


class KeyGuard:
    """Asks for one of the keys on every path but the probes'."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN_PATHS:
            key = bearer_key(scope)
            if not any(hmac.compare_digest(key, known) for known in self.keys):
                problem = Problem("unauthorized", "cannot go on without a valid API key: send "
                                  "Authorization: Bearer <key>")  # fmt: skip
                response = problem_response(problem, scope)
                response.headers["WWW-Authenticate"] = "Bearer"
                return await response(scope, receive, send)
        await self.app(scope, receive, send)


def bearer_key(scope: Scope) -> bytes:
    """The key that the request carries, as bytes: it need not be ASCII."""
    for name, value in scope["headers"]:
        if name.lower() == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:]).strip()
    return b""
