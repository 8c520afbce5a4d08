"""A job, the queue's order, and deadlines. Pure: time is an argument, in seconds.

A job is accepted once and ends once. In between it may be sent to several
workers, one after the other, always with the same seeds.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ipc import messages
from supervisor.errors import Problem
from supervisor.estimates import Estimates
from supervisor.placement import JobView
from supervisor.states import ENDED_JOB_STATES, JobEvent, JobState, next_job_state

SECONDS_PER_PRIORITY = 2.0
"""A job that waits gains a point of priority in this time, so that none waits for ever."""


class Change(msgspec.Struct, frozen=True, tag_field="event", tag=str.lower):
    """Something to tell whoever watches a job."""


class Queued(Change, frozen=True):
    position: int


class Loading(Change, frozen=True):
    model: str
    fraction: float


class Progress(Change, frozen=True):
    step: int
    steps: int
    fraction: float


class Preview(Change, frozen=True):
    image: bytes


class Ended(Change, frozen=True):
    """The job's outcome is set."""


@dataclass(slots=True)
class Outcome:
    """How a job ended: pictures in order, or the problem."""

    pictures: list[messages.Picture] = field(default_factory=list)
    finished: messages.Finished | None = None
    problem: Problem | None = None


@dataclass(slots=True, eq=False)
class Job:
    """One request to the workers; `message` is sent again as it is after a death."""

    id: str
    message: messages.Generate | messages.Load | messages.Unload
    accepted_at: float
    deadline: float
    request_id: str = ""
    caller: str = ""
    pinned_worker: int | None = None
    state: JobState = JobState.QUEUED
    attempts: int = 0
    deaths: int = 0
    deaths_alone: int = 0
    alone: bool = False
    worker: int | None = None
    position: int = 0
    started_at: float | None = None
    phase: messages.Phase | None = None
    step: int = 0
    steps: int = 0
    pictures: dict[int, messages.Picture] = field(default_factory=dict)
    outcome: Outcome | None = None
    watchers: list[Callable[[Change], None]] = field(default_factory=list)

    @property
    def model(self) -> str:
        """What must be resident to run it: the checkpoint's path."""
        return self.message.checkpoint.path

    @property
    def priority(self) -> int:
        return self.message.priority if isinstance(self.message, messages.Generate) else 0

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED_JOB_STATES

    def tell(self, change: Change) -> None:
        for watcher in tuple(self.watchers):
            watcher(change)

    def dispatched(self, worker: int, now: float) -> None:
        self.state = next_job_state(self.state, JobEvent.DISPATCHED)
        self.worker, self.attempts = worker, self.attempts + 1
        self.started_at = self.started_at or now

    def worker_lost(self, ran_alone: bool) -> None:
        """Back to the queue, to run by itself with nothing of the lost attempt kept."""
        self.state = next_job_state(self.state, JobEvent.WORKER_LOST)
        self.deaths += 1
        self.deaths_alone += ran_alone
        self.worker, self.alone, self.phase, self.step = None, True, None, 0
        self.pictures.clear()

    def ended(self, event: JobEvent, outcome: Outcome) -> None:
        self.state = next_job_state(self.state, event)
        self.outcome = outcome
        self.tell(Ended())

    def steps_left(self) -> int:
        return max(self.expected_steps() - self.step, 0)

    def expected_steps(self) -> int:
        """Denoising steps over all calls; 0 for a job that makes no picture."""
        if not isinstance(self.message, messages.Generate):
            return 0
        if self.steps:
            return self.steps
        each = self.message.parameters.get("num_inference_steps") or 50
        return int(each) * len(self.message.calls)

    def outgoing(self) -> Any:
        """The message for the worker that takes the job now."""
        if isinstance(self.message, messages.Generate):
            return msgspec.structs.replace(self.message, alone=self.alone)
        return self.message

    def view(self, estimates: Estimates) -> JobView:
        return JobView(
            id=self.id,
            model=self.model,
            work_seconds=self.steps_left() * estimates.steps.expected(self.model),
            swap_seconds=estimates.swaps.expected(self.model),
            alone=self.alone,
            worker=self.pinned_worker,
        )


def in_order(jobs: Iterable[Job], running: Iterable[Job], now: float) -> list[Job]:
    """Queued jobs as they should be served.

    By priority, where waiting counts; among equals each caller's first job comes
    before anybody's second, and what a caller has running counts as before.
    """
    ahead = Counter(job.caller for job in running)
    ranked = []
    for job in sorted(jobs, key=lambda job: (-_urgency(job, now), job.accepted_at)):
        ranked.append((-_urgency(job, now), ahead[job.caller], job.accepted_at, job))
        ahead[job.caller] += 1
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:-1])]


def _urgency(job: Job, now: float) -> int:
    return job.priority + int((now - job.accepted_at) / SECONDS_PER_PRIORITY)


def overdue(jobs: Iterable[Job], now: float) -> list[Job]:
    return [job for job in jobs if now >= job.deadline]
