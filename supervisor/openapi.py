"""The OpenAPI 3.1 document, from the operations, the body types and the catalogue."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec

from supervisor import VERSION, catalogue
from supervisor.errors import CATALOGUE
from supervisor.operations import Operation

REF = "#/components/schemas/"
# Every route can answer with these.
COMMON_ERRORS = ("body_too_large", "body_timeout", "internal_error", "unauthorized")

PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "enum": sorted(CATALOGUE)},
        "request_id": {"type": "string"},
        "field": {"type": "string"},
    },
}
GENERATED = {
    "type": "object",
    "required": ["batch_id", "images", "inputs", "meta"],
    "properties": {
        "batch_id": {"type": "string"},
        "images": {"type": "array", "items": {"type": "string"},
                   "description": "base64, or stored names when return_images is false"},
        "inputs": {"type": "object", "description": "the request as it was understood"},
        "meta": {"type": "object", "description": "times in seconds, seeds, worker, attempts"},
    },
}  # fmt: skip
JOB = {
    "type": "object",
    "required": ["id", "status", "position", "step", "steps", "result", "error"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["queued", "running", "finished", "failed", "cancelled", "expired"]},
        "position": {"type": ["integer", "null"]},
        "step": {"type": "integer"},
        "steps": {"type": "integer"},
        "result": {"anyOf": [{"$ref": f"{REF}Generated"}, {"type": "null"}]},
        "error": {"anyOf": [{"$ref": f"{REF}Problem"}, {"type": "null"}]},
    },
}


def document(operations: Sequence[Operation], needs_key: bool) -> dict[str, Any]:
    bodies = [operation.body for operation in operations if operation.body]
    _, schemas = msgspec.json.schema_components(bodies, ref_template=REF + "{name}")
    fixed = {"Problem": PROBLEM, "Generated": GENERATED, "Job": JOB}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        for path, described in _expanded(operation):
            paths.setdefault(path, {})[operation.method.lower()] = described
    content: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Image Generation Inference", "version": VERSION},
        "paths": paths,
        "components": {"schemas": {**schemas, **fixed, **_parameter_schemas()}},
    }
    if needs_key:
        content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        content["security"] = [{"key": []}]
    return content


def _expanded(operation: Operation) -> list[tuple[str, dict[str, Any]]]:
    """The operation; one per pipeline class where its path names one."""
    if "{pipeline}" not in operation.path:
        return [(operation.path.replace(":path", ""), _described(operation, None))]
    return [
        (operation.path.replace("{pipeline}", name), _described(operation, name))
        for name in sorted(catalogue.pipelines())
    ]


def _described(operation: Operation, pipeline: str | None) -> dict[str, Any]:
    name = f"{operation.method} {operation.path}".replace("{pipeline}", pipeline or "")
    described: dict[str, Any] = {
        "operationId": re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower(),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation),
    }
    if parameters := _parameters(operation):
        described["parameters"] = parameters
    if operation.body:
        schema = _body_schema(operation.body, pipeline)
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _body_schema(body: type[msgspec.Struct], pipeline: str | None) -> dict[str, Any]:
    if pipeline is None:
        return {"$ref": REF + body.__name__}
    _, schemas = msgspec.json.schema_components([body], ref_template=REF + "{name}")
    whole: dict[str, Any] = schemas[body.__name__]
    properties = {key: value for key, value in whole["properties"].items() if key != "pipeline"}
    return whole | {"properties": properties | {"parameters": {"$ref": f"{REF}{pipeline}"}}}


@cache
def _parameter_schemas() -> dict[str, Any]:
    return {name: catalogue.parameters_schema(name) for name in catalogue.pipelines()}


def _parameters(operation: Operation) -> list[dict[str, Any]]:
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


def _responses(operation: Operation) -> dict[str, Any]:
    schema = operation.answer or {}
    answers: dict[str, Any] = {
        str(operation.status): {
            "description": "Done",
            "content": {operation.media_type: {"schema": schema}},
        }
    }
    if operation.tag == "generation":
        answers["202"] = {"description": "Accepted, to be asked for later"}
    for code in (*operation.errors, *COMMON_ERRORS):
        status = str(CATALOGUE[code].status)
        titles = answers.get(status, {}).get("description", "")
        answers[status] = {
            "description": f"{titles}; {code}" if titles else code,
            "content": {"application/problem+json": {"schema": {"$ref": f"{REF}Problem"}}},
        }
    return answers
