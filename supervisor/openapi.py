"""The OpenAPI 3.1 document, from the operations, the body types and the catalogue."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import msgspec

from supervisor import VERSION, answers, catalogue
from supervisor.errors import CATALOGUE
from supervisor.guards import OPEN_PATHS
from supervisor.operations import Operation

SCHEMAS = "#/components/schemas/"
RESPONSES = "#/components/responses/"
HEADERS = "#/components/headers/"
# Every route can answer with these.
COMMON_ERRORS = ("body_too_large", "body_timeout", "internal_error")
REQUEST_ID = {"X-Request-Id": {"$ref": HEADERS + "X-Request-Id"}}
RETRY_AFTER = {429, 503}
PIPELINES = "pipelines"
EVENT = {
    "type": "object",
    "description": "one event of the stream; its data is JSON",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}

Schema = dict[str, Any]


def document(operations: Sequence[Operation], needs_key: bool) -> Schema:
    """The whole document. With `needs_key`, all but the probes ask for a key."""
    paths: dict[str, Schema] = {}
    for operation in operations:
        for path, described in _expanded(operation, needs_key):
            paths.setdefault(path, {})[operation.method.lower()] = described
    content: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Image Generation Inference", "version": VERSION},
        "tags": [{"name": tag} for tag in _tags(operations)],
        "paths": paths,
        "components": {
            "schemas": _schemas(operations),
            "responses": _error_responses(operations),
            "headers": {
                "X-Request-Id": {"schema": {"type": "string"}},
                "Retry-After": {"schema": {"type": "integer"}, "description": "seconds"},
            },
        },
    }
    if needs_key:
        content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        content["security"] = [{"key": []}]
    return content


def _tags(operations: Sequence[Operation]) -> list[str]:
    """In the routes' order; the many pipelines come last."""
    return [*dict.fromkeys(operation.tag for operation in operations), PIPELINES]


def _schemas(operations: Sequence[Operation]) -> Schema:
    bodies = [operation.body for operation in operations if operation.body]
    _, found = msgspec.json.schema_components(
        [*bodies, *answers.ALL], ref_template=SCHEMAS + "{name}"
    )
    found["ProblemBody"]["properties"]["code"] = {"enum": sorted(CATALOGUE)}
    return {**found, **_parameter_schemas()}


@cache
def _parameter_schemas() -> Schema:
    return {name: catalogue.parameters_schema(name) for name in catalogue.pipelines()}


def _expanded(operation: Operation, needs_key: bool) -> list[tuple[str, Schema]]:
    """The operation; one per pipeline class where its path names one."""
    names: Iterable[str | None] = [None]
    if "{pipeline}" in operation.path:
        names = sorted(catalogue.pipelines())
    path = operation.path.replace(":path}", "}")
    return [
        (path.replace("{pipeline}", name or ""), _described(operation, name, needs_key))
        for name in names
    ]


def _described(operation: Operation, pipeline: str | None, needs_key: bool) -> Schema:
    name = f"{operation.method} {operation.path}".replace("{pipeline}", pipeline or "")
    is_open = operation.path in OPEN_PATHS
    codes = [*operation.errors, *COMMON_ERRORS]
    if needs_key and not is_open:
        codes.append("unauthorized")
    described: Schema = {
        "operationId": re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower(),
        "summary": operation.summary,
        "description": "Errors: " + ", ".join(f"`{code}`" for code in codes),
        "tags": [PIPELINES if pipeline else operation.tag],
        "responses": {**_answers(operation), **_errors(operation.path, codes)},
    }
    if needs_key and is_open:
        described["security"] = []
    if parameters := _parameters(operation):
        described["parameters"] = parameters
    if operation.body:
        described["requestBody"] = {"required": True, "content": _body(operation, pipeline)}
    return described


def _body(operation: Operation, pipeline: str | None) -> Schema:
    """The body's media type and schema; the example where it has all that is required."""
    assert operation.body is not None
    name = operation.body.__name__
    content: Schema = {"schema": {"$ref": SCHEMAS + name}}
    if operation.example and set(_required(pipeline)) <= set(operation.example["parameters"]):
        content["example"] = operation.example
    if operation.files is None and pipeline is None:
        return {"application/json": content}
    _, schemas = msgspec.json.schema_components([operation.body], ref_template=SCHEMAS + "{name}")
    whole: Schema = schemas[name]
    if operation.files is not None:
        properties = {**whole["properties"], **operation.files}
        return {"multipart/form-data": {"schema": whole | {"properties": properties}}}
    properties = {key: value for key, value in whole["properties"].items() if key != "pipeline"}
    properties["parameters"] = {"$ref": f"{SCHEMAS}{pipeline}"}
    return {"application/json": content | {"schema": whole | {"properties": properties}}}


def _required(pipeline: str | None) -> list[str]:
    if pipeline is None:
        return []
    parameters = catalogue.pipeline(pipeline).parameters.items()
    return [name for name, parameter in parameters if parameter.required]


def _parameters(operation: Operation) -> list[Schema]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)(?::path)?}", operation.path)
        if name != "pipeline"
    ]
    asked = [("query", operation.query or {}), ("header", operation.headers or {})]
    return in_path + [
        {"name": name, "in": place, "required": False, "schema": schema}
        for place, schemas in asked
        for name, schema in schemas.items()
    ]


def _answers(operation: Operation) -> Schema:
    schema = operation.answer
    if isinstance(schema, type):
        schema = {"$ref": SCHEMAS + schema.__name__}
    if operation.media_type == "text/event-stream":
        schema = EVENT
    content: Schema = {operation.media_type: {"schema": schema or {}}}
    if operation.streams:
        content["text/event-stream"] = {"schema": EVENT}
    found: Schema = {
        str(operation.status): {"description": "Done", "headers": REQUEST_ID, "content": content}
    }
    if operation.may_wait:
        accepted = {"application/json": {"schema": {"$ref": SCHEMAS + "Accepted"}}}
        location = {"Location": {"schema": {"type": "string"}}}
        found["202"] = {"description": "Accepted, to be asked for later",
                        "headers": REQUEST_ID | location, "content": accepted}  # fmt: skip
    return found


def _errors(path: str, codes: Iterable[str]) -> Schema:
    return {str(_status(path, code)): {"$ref": RESPONSES + _name(path, code)} for code in codes}


def _is_openai(path: str) -> bool:
    return path.startswith("/v1/")


def _status(path: str, code: str) -> int:
    status = CATALOGUE[code].status
    return 400 if status == 422 and _is_openai(path) else status


def _name(path: str, code: str) -> str:
    return f"{'Openai' if _is_openai(path) else 'Problem'}{_status(path, code)}"


def _error_responses(operations: Sequence[Operation]) -> Schema:
    """One response for each status and form that some route answers with."""
    found: dict[str, Schema] = {}
    for operation in operations:
        for code in (*operation.errors, *COMMON_ERRORS, "unauthorized"):
            path = operation.path
            status = _status(path, code)
            kind = "OpenaiError" if _is_openai(path) else "ProblemBody"
            media_type = "application/json" if _is_openai(path) else "application/problem+json"
            retry = {"Retry-After": {"$ref": HEADERS + "Retry-After"}}
            found[_name(path, code)] = {
                "description": CATALOGUE[code].title,
                "headers": REQUEST_ID | (retry if status in RETRY_AFTER else {}),
                "content": {media_type: {"schema": {"$ref": SCHEMAS + kind}}},
            }
    return found
