"""Wires the ASGI application: guards around routes, and what the routes need."""

from functools import cache

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from supervisor import openapi
from supervisor.errors import Problem
from supervisor.guards import BodyGuard, KeyGuard, RequestId
from supervisor.metrics import Metered, Metrics
from supervisor.models import Models
from supervisor.operations import Operation
from supervisor.problems import on_http_exception, on_problem
from supervisor.routes import docs, generate, images, inspect, jobs, metrics, models, openai
from supervisor.service import Service
from supervisor.storage import Storage

OPERATIONS: list[Operation] = [
    *generate.OPERATIONS,
    *jobs.OPERATIONS,
    *images.OPERATIONS,
    *models.OPERATIONS,
    *openai.OPERATIONS,
    *inspect.OPERATIONS,
    *metrics.OPERATIONS,
    *docs.OPERATIONS,
]


def build(service: Service, models: Models, storage: Storage) -> ASGIApp:
    """The whole application. Its service is run by whoever runs the application."""
    settings = service.settings

    @cache
    def document() -> bytes:
        return msgspec.json.encode(openapi.document(OPERATIONS, bool(settings.api_keys)))

    app = Starlette(
        routes=[
            Route(operation.path, operation.endpoint, methods=[operation.method])
            for operation in OPERATIONS
        ],
        exception_handlers={Problem: on_problem, HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.models = models
    app.state.storage = storage
    app.state.openapi = document
    app.state.metrics = figures = Metrics(service.fleet)
    service.fleet.observers.append(figures)
    guarded = KeyGuard(app, settings.api_keys)
    read = BodyGuard(guarded, settings.max_body_bytes, settings.body_timeout_seconds)
    return RequestId(Metered(read, figures))
