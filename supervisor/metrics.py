"""What operators measure: Prometheus figures of requests, jobs, workers and devices.

Listens to the fleet and to every HTTP answer; gauges are read when they are asked for.
Every label takes few values: routes as templates, codes of the catalogue, worker ids.
"""

import asyncio
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ipc import messages
from supervisor.fleet import Fleet
from supervisor.jobs import Job
from supervisor.observer import Observer
from supervisor.states import WorkerState
from supervisor.worker import Cause, Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32)
RUNGS = ("evicted", "split_batch", "slicing", "tiling", "retried")


class Metrics(Observer):
    """All figures of one server, in a registry of their own."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(Gauges(fleet))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"igi_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(f"igi_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("http_requests", "Answered requests", "route", "status")
        self.request_seconds = histogram("http_request_seconds", "From head to answer", "route")
        self.refused = counter("jobs_refused", "Jobs that were not accepted", "code")
        self.ended = counter("jobs", "Accepted jobs by how they ended", "state", "code")
        self.queue_seconds = histogram("job_queue_seconds", "From acceptance to a worker")
        self.job_seconds = histogram("job_seconds", "From acceptance to the end", "state")
        self.step_seconds = histogram(
            "step_seconds", "A job's mean step", "worker", buckets=STEP_SECONDS
        )
        self.batch_rows = histogram("batch_rows", "Pictures that share a step", buckets=ROWS)
        self.swaps = counter("model_loads", "Models that became resident", "worker")
        self.exits = counter("worker_exits", "Worker processes that ended", "worker", "reason")
        self.out_of_memory = counter("out_of_memory", "By what helped, or failed", "rung")

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request to a route, given as its template, has its answer."""
        self.requests.labels(route, f"{status // 100}xx" if status else "none").inc()
        self.request_seconds.labels(route).observe(seconds)

    def job_refused(self, code: str) -> None:
        self.refused.labels(code).inc()

    def job_dispatched(self, job: Job, worker: Worker) -> None:
        if job.attempts == 1 and job.started_at is not None:
            self.queue_seconds.observe(job.started_at - job.accepted_at)

    def job_answered(self, job: Job, worker: Worker, finished: messages.Finished) -> None:
        if finished.step_seconds is not None:
            self.step_seconds.labels(worker.id).observe(finished.step_seconds)
        if finished.batch_rows is not None:
            self.batch_rows.observe(finished.batch_rows)
        if finished.memory_fallback is not None:
            known = finished.memory_fallback in RUNGS
            self.out_of_memory.labels(finished.memory_fallback if known else "other").inc()

    def job_ended(self, job: Job) -> None:
        problem = job.outcome.problem if job.outcome else None
        self.ended.labels(job.state, problem.code if problem else "").inc()
        self.job_seconds.labels(job.state).observe(time.monotonic() - job.accepted_at)
        if problem is not None and problem.code == "out_of_memory":
            self.out_of_memory.labels("failed").inc()

    def worker_exited(self, worker: Worker, cause: Cause) -> None:
        self.exits.labels(worker.id, cause.kind).inc()

    def models_changed(
        self,
        worker: Worker,
        loaded: list[messages.Resident],
        unloaded: list[messages.Resident],
    ) -> None:
        self.swaps.labels(worker.id).inc(len(loaded))


class Gauges(Collector):
    """What is so at the moment of asking."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        workers = self._fleet.workers.values()
        queued = GaugeMetricFamily("igi_jobs_queued", "Jobs that wait for a worker")
        queued.add_metric([], len(self._fleet.queued))
        running = GaugeMetricFamily("igi_jobs_running", "Jobs on a worker", labels=["worker"])
        states = GaugeMetricFamily(
            "igi_worker_state", "1 for the state that it is in", labels=["worker", "state"]
        )
        memory = GaugeMetricFamily(
            "igi_device_memory_bytes", "As its worker said last", labels=["worker", "kind"]
        )
        for worker in workers:
            running.add_metric([str(worker.id)], len(worker.running))
            for state in WorkerState:
                states.add_metric([str(worker.id), state], worker.state is state)
            for kind in ("total", "used", "free") if worker.memory else ():
                memory.add_metric([str(worker.id), kind], getattr(worker.memory, kind))
        tasks = GaugeMetricFamily("igi_tasks", "Tasks of the supervisor's event loop")
        tasks.add_metric([], len(asyncio.all_tasks()))
        return [queued, running, states, memory, tasks]


class Metered:
    """Counts each request's answer under its route's template; plain ASGI, around the routes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status, time.monotonic() - began)
