"""Problems as HTTP answers: RFC 9457 bodies, and OpenAI's form under /v1."""

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from supervisor.errors import Problem

CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large",
         415: "unsupported_media_type"}  # fmt: skip
OPENAI_PARAMS = {
    "checkpoint": "model",
    "pipeline": "model",
    "previews": "partial_images",
    "parameters.width": "size",
    "parameters.height": "size",
    "parameters.mask_image": "mask",
    "parameters.num_images_per_prompt": "n",
}
"""Our fields -> OpenAI's; others keep their name, without `parameters.`."""


def problem_response(problem: Problem, scope: Scope) -> Response:
    """The answer that a problem stands for, in the form of the path that was asked."""
    if scope.get("path", "").startswith("/v1/"):
        response = _openai_response(problem)
    else:
        request_id = scope.get("state", {}).get("request_id", "")
        body = msgspec.json.encode(problem_body(problem, request_id))
        response = Response(body, problem.status, media_type="application/problem+json")
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    return response


def problem_body(problem: Problem, request_id: str) -> dict[str, Any]:
    body = {
        "type": f"urn:igi:error:{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id,
    }
    if problem.field:
        body["field"] = problem.field
    return body | problem.extra


def _openai_response(problem: Problem) -> Response:
    body = msgspec.json.encode(openai_body(problem))
    return Response(body, _openai_status(problem), media_type="application/json")


def _openai_status(problem: Problem) -> int:
    return 400 if problem.status == 422 else problem.status


def openai_body(problem: Problem) -> dict[str, Any]:
    """OpenAI's form, with the fields under OpenAI's names."""
    kind = "invalid_request_error" if _openai_status(problem) < 500 else "server_error"
    field, message = problem.field, problem.detail
    param = None
    if field:
        param = OPENAI_PARAMS.get(field, field.removeprefix("parameters."))
        message = message.replace(field, param)
    error = {"message": message, "type": kind, "param": param, "code": problem.code}
    return {"error": error | problem.extra}


async def on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own answers, such as to an unknown path, in our form."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    detail = f"cannot {request.method} {request.url.path[:200]}: {error.detail.lower()}"
    response = problem_response(Problem(code, detail), request.scope)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> list[str]:
    """All that the address takes: Starlette tells those of its first route alone."""
    routes = [one for one in request.app.routes if one.matches(request.scope)[0] != Match.NONE]
    return sorted({method for route in routes for method in route.methods})
