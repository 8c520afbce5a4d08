"""One device's worker as the fleet sees it: its state, what it holds, what it runs.

Knows no pipes and no clock: the process is something to post messages to and to
signal, and time is an argument, in seconds.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ipc import messages
from supervisor.estimates import Estimates
from supervisor.jobs import Job
from supervisor.placement import WorkerView
from supervisor.settings import Settings
from supervisor.states import WorkerEvent, WorkerState, next_worker_state

TERM_AFTER_SECONDS = 2.0
KILL_AFTER_SECONDS = 5.0
STAY_UP_SECONDS = 10.0
"""A worker that was ready for so long is forgiven its earlier deaths."""


class Process(Protocol):
    pid: int

    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class CauseKind(enum.StrEnum):
    """Why a worker's process ended, as a label."""

    PLANNED = "planned"
    EXITED = "exited"
    """By itself, without a word."""
    KILLED = "killed"
    """By somebody else than its supervisor, such as the kernel."""
    WORN = "worn"
    """It asked for a successor, and had done its jobs."""
    FATAL = "fatal"
    """It said that it could not go on."""
    STALLED = "stalled"
    PROTOCOL = "protocol"
    LAUNCH = "launch"
    """It could not load LAUNCH_CHECKPOINT."""


class Cause(NamedTuple):
    """Why a process ended, or is going to; `words` follow after 'the worker'."""

    kind: CauseKind
    words: str


def _nothing(message: messages.ToWorker) -> None:
    """Where messages for a process that is gone end up."""


@dataclass(slots=True, eq=False)
class Worker:
    """`failures` are deaths in a row without a finished job between them, `failed_starts`
    those before ready."""

    id: int
    device: str
    state: WorkerState = WorkerState.STARTING
    state_since: float = 0.0
    process: Process | None = None
    post: Callable[[Any], None] = _nothing
    name: str = ""
    capacity: int = 1
    packages: dict[str, str | None] = field(default_factory=dict)
    memory: messages.Memory | None = None
    models: list[messages.Resident] = field(default_factory=list)
    running: dict[str, Job] = field(default_factory=dict)
    moved_at: float = 0.0
    """When anything was last heard of it."""
    failures: int = 0
    failed_starts: int = 0
    restarts: int = 0
    restart_at: float = 0.0
    last_exit: str | None = None
    cause: Cause | None = None
    wear: Cause | None = None
    """Why it wants to be replaced."""
    was_ready: bool = False
    """At any time in the life of this process."""
    step_seconds: float | None = None

    def happened(self, event: WorkerEvent, now: float) -> None:
        before, self.state = self.state, next_worker_state(self.state, event)
        if self.state is not before:
            self.state_since = now
        if self.state is WorkerState.READY:
            self.was_ready = True

    def began(self, process: Process, post: Callable[[Any], None], now: float) -> None:
        self.process, self.post, self.state_since, self.moved_at = process, post, now, now
        self.was_ready = False

    def gone(self) -> list[Job]:
        """Forgets the process; returns the jobs that were on it."""
        jobs = list(self.running.values())
        self.process, self.post, self.memory = None, _nothing, None
        self.cause = self.wear = None
        self.models, self.running = [], {}
        return jobs

    def died(self, last_exit: str) -> None:
        """Counts an end that was not planned."""
        self.last_exit = last_exit
        self.failures += 1
        self.failed_starts = 0 if self.was_ready else self.failed_starts + 1

    def told(self, residency: messages.Residency, now: float) -> None:
        """What it holds now. Jobs whose model has come to its device begin their steps."""
        before = self._loaded
        self.models, self.memory = residency.models, residency.memory
        come = self._loaded - before
        for job in self.running.values():
            if job.model in come:
                job.moved_at = now

    def holds(self, path: str) -> bool:
        """On its device, or mapped for it on the host."""
        return any(model.path == path for model in self.models)

    @property
    def resident(self) -> frozenset[str]:
        """What a job needs no swap for: models on its device that stay there, and those that its
        jobs load."""
        jobs = [job for job in self.running.values() if not job.has_ended]
        going = {job.model for job in jobs if isinstance(job.message, messages.Unload)}
        return frozenset((self._loaded | {job.model for job in jobs}) - going)

    @property
    def _loaded(self) -> set[str]:
        return {model.path for model in self.models if model.tier == "device"}

    def stalled(self, settings: Settings, launching: bool, now: float) -> str | None:
        """What took longer than it may, in words; None when all goes on."""
        if self.state is WorkerState.STARTING and self.process:
            allowance = settings.load_timeout_seconds if launching else 0.0
            limit = settings.start_timeout_seconds + allowance
            late = now - self.state_since > limit
            return f"was not ready within {limit:g} s" if late else None
        if self.state in (WorkerState.READY, WorkerState.DRAINING) and self.running:
            return self._stalled_job(settings, now)
        return None

    def _stalled_job(self, settings: Settings, now: float) -> str | None:
        """The worker as a whole must move, and each of its jobs, that share it, in their turn."""
        begun = [job for job in self.running.values() if job.phase is not None]
        limits = {job.id: phase_seconds(job, settings) for job in begun}
        whole = max(limits.values(), default=settings.step_timeout_seconds)
        if now - self.moved_at > whole:
            phases = sorted({job.phase or "waiting" for job in begun}) or ["waiting"]
            return f"made no progress for {whole:g} s while {' and '.join(phases)}"
        for job in begun:
            if now - job.moved_at > whole * (len(begun) - 1) + limits[job.id]:
                return f"made no progress with one of its {len(begun)} jobs while {job.phase}"
        return None

    def stop_is_overdue(self, now: float) -> bool:
        stopping = self.state in (WorkerState.STOPPING, WorkerState.KILLING)
        return stopping and now - self.state_since > KILL_AFTER_SECONDS

    def term_is_due(self, now: float) -> bool:
        stopping = self.state is WorkerState.STOPPING
        return stopping and now - self.state_since > TERM_AFTER_SECONDS

    def has_stayed_up(self, now: float) -> bool:
        return self.state is WorkerState.READY and now - self.state_since > STAY_UP_SECONDS

    def view(self, estimates: Estimates, now: float) -> WorkerView:
        jobs, loaded = self.running.values(), self._loaded
        return WorkerView(
            id=self.id,
            capacity=self.capacity,
            running_seconds=tuple(
                job.running_seconds(estimates, len(jobs), now, loaded=job.model in loaded)
                for job in jobs
            ),
            exclusive=any(job.alone for job in jobs),
            resident=self.resident,
        )


def phase_seconds(job: Job, settings: Settings) -> float:
    """How long a job may stay where it is. stable-fast traces a module at a first step."""
    traces = settings.compile_backend == "stable-fast" and job.step == 0
    if job.phase == "loading" or traces:
        return settings.load_timeout_seconds
    return settings.step_timeout_seconds
