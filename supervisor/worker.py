"""One device's worker as the fleet sees it: its state, what it holds, what it runs.

Knows no pipes and no clock: the process is something to post messages to and to
signal, and time is an argument, in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ipc import messages
from supervisor.estimates import Estimates
from supervisor.jobs import Job
from supervisor.placement import WorkerView
from supervisor.settings import Settings
from supervisor.states import LIVE_WORKER_STATES, WorkerEvent, WorkerState, next_worker_state

TERM_AFTER_SECONDS = 2.0
KILL_AFTER_SECONDS = 5.0
STAY_UP_SECONDS = 10.0
"""A worker that was ready for so long is forgiven its earlier deaths."""


class Process(Protocol):
    pid: int

    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def _nothing(message: messages.ToWorker) -> None:
    """Where messages for a process that is gone end up."""


@dataclass(slots=True, eq=False)
class Worker:
    """`failures` are deaths in a row, `failed_starts` those of them before ready."""

    id: int
    device: str
    state: WorkerState = WorkerState.STARTING
    state_since: float = 0.0
    process: Process | None = None
    post: Callable[[messages.ToWorker], None] = _nothing
    name: str = ""
    capacity: int = 1
    packages: dict[str, str | None] = field(default_factory=dict)
    memory: messages.Memory | None = None
    models: list[messages.Resident] = field(default_factory=list)
    running: dict[str, Job] = field(default_factory=dict)
    moved_at: float = 0.0
    """When anything was last heard of the jobs that run."""
    failures: int = 0
    failed_starts: int = 0
    restarts: int = 0
    restart_at: float = 0.0
    last_exit: str | None = None
    fatal: messages.Fatal | None = None
    signalled: bool = False
    """This side has ended the process: its exit blames nobody."""
    step_seconds: float | None = None

    def happened(self, event: WorkerEvent, now: float) -> None:
        before, self.state = self.state, next_worker_state(self.state, event)
        if self.state is not before:
            self.state_since = now

    def began(self, process: Process, post: Callable[[Any], None], now: float) -> None:
        self.process, self.post, self.state_since, self.moved_at = process, post, now, now
        self.fatal, self.signalled = None, False

    def gone(self) -> list[Job]:
        """Forgets the process; returns the jobs that ran on it."""
        jobs = list(self.running.values())
        self.process, self.post, self.memory = None, _nothing, None
        self.models, self.running = [], {}
        return jobs

    @property
    def is_alive(self) -> bool:
        return self.state in LIVE_WORKER_STATES

    def holds(self, path: str) -> bool:
        return any(model.path == path for model in self.models)

    def is_stalled(self, settings: Settings, launching: bool, now: float) -> bool:
        """True when the phase it is in has taken longer than that phase may."""
        if self.state is WorkerState.STARTING:
            allowance = settings.load_timeout_seconds if launching else 0.0
            return now - self.state_since > settings.start_timeout_seconds + allowance
        if self.state not in (WorkerState.READY, WorkerState.DRAINING) or not self.running:
            return False
        loading = any(job.phase in (None, "loading") for job in self.running.values())
        limit = settings.load_timeout_seconds if loading else settings.step_timeout_seconds
        return now - self.moved_at > limit

    def stop_is_overdue(self, now: float) -> bool:
        stopping = self.state in (WorkerState.STOPPING, WorkerState.KILLING)
        return stopping and now - self.state_since > KILL_AFTER_SECONDS

    def term_is_due(self, now: float) -> bool:
        stopping = self.state is WorkerState.STOPPING
        return stopping and now - self.state_since > TERM_AFTER_SECONDS

    def has_stayed_up(self, now: float) -> bool:
        return self.state is WorkerState.READY and now - self.state_since > STAY_UP_SECONDS

    def view(self, estimates: Estimates) -> WorkerView:
        work = [
            job.steps_left() * estimates.steps.expected(job.model)
            for job in self.running.values()
        ]
        return WorkerView(
            id=self.id,
            capacity=self.capacity,
            running=len(self.running),
            exclusive=any(job.alone for job in self.running.values()),
            busy_seconds=max([sum(work) / self.capacity, *work]),
            resident=frozenset(model.path for model in self.models),
        )
