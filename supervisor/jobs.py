"""A job, the queue's order, and deadlines. Pure: time is an argument, in seconds.

A job is accepted once and ends once. In between it may be sent to several
workers, one after the other, always with the same seeds.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import assert_never

import msgspec

from ipc import messages
from supervisor.errors import Problem
from supervisor.estimates import Estimates
from supervisor.placement import JobView, slowdown
from supervisor.states import (
    ENDED_JOB_STATES,
    ImpossibleTransition,
    JobEvent,
    JobState,
    next_job_state,
)

SECONDS_PER_PRIORITY = 2.0
"""A job that waits gains a point of priority in this time, so that none waits for ever."""

GUESSED_STEPS = 50
"""What most pipelines do when nothing is said."""

UNFOLLOWED_SECONDS = 4.0
"""How late signs of progress and pictures may be where nobody looks on: each message costs the
supervisor a wake-up, and the steps in between follow from the time."""


Moved = messages.Progress | messages.Preview | messages.Picture
Answered = messages.Finished | messages.Rejected | messages.Failed | messages.Cancelled


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
    followed: bool = True
    """Somebody may look at its steps."""
    state: JobState = JobState.QUEUED
    attempts: int = 0
    deaths: int = 0
    killed_from_outside: int = 0
    alone: bool = False
    worker: int | None = None
    left_worker: int | None = None
    """The worker that died under it last."""
    swaps: bool = False
    """Its worker did not hold the model when the job was sent there."""
    moved_at: float = 0.0
    """When its worker last said anything of it, or that its model is there."""
    position: int = 0
    started_at: float | None = None
    phase: messages.Phase | None = None
    step: int = 0
    steps: int = 0
    pictures: dict[int, messages.Picture] = field(default_factory=dict)
    outcome: Outcome | None = None
    watchers: list[Callable[[Change], None]] = field(default_factory=list)
    _kind: str | None = None

    @property
    def model(self) -> str:
        """What must be resident to run it: the checkpoint's path."""
        return self.message.checkpoint.path

    @property
    def kind(self) -> str:
        """What the cost of its steps depends on most: the checkpoint and the pictures' size."""
        if self._kind is None:  # placement asks it of all jobs at every one that comes
            self._kind = self.model
            if isinstance(self.message, messages.Generate):
                given = self.message.parameters
                self._kind += f" {given.get('width')}x{given.get('height')}"
        return self._kind

    @property
    def priority(self) -> int:
        return self.message.priority if isinstance(self.message, messages.Generate) else 0

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED_JOB_STATES

    def take(self, message: messages.Generate) -> None:
        """What the job is to do, once it is prepared."""
        self.message, self._kind = message, None

    def tell(self, change: Change) -> None:
        for watcher in () if self.has_ended and change != Ended() else tuple(self.watchers):
            watcher(change)

    def dispatched(self, worker: int, now: float, swaps: bool) -> None:
        self.state = next_job_state(self.state, JobEvent.DISPATCHED)
        self.worker, self.attempts, self.swaps = worker, self.attempts + 1, swaps
        self.started_at = self.started_at or now
        self.moved_at = now

    def moved(self, message: Moved, now: float) -> None:
        """Its worker is getting on with it. Raises ImpossibleTransition for what cannot be."""
        self.moved_at = now
        match message:
            case messages.Picture():
                if not 0 <= message.index < self.expected_pictures:
                    raise ImpossibleTransition(f"cannot have picture {message.index}")
                if not self.has_ended:
                    self.pictures[message.index] = message
            case messages.Preview():
                self.tell(Preview(message.data))
            case messages.Progress(phase="loading"):
                self.phase = message.phase
                share = message.step / message.steps if message.steps else 0.0
                self.tell(Loading(self.message.checkpoint.name, share))
            case messages.Progress():
                self.phase, self.step, self.steps = message.phase, message.step, message.steps
                self.tell(Progress(self.step, self.steps, self.step / max(self.steps, 1)))
            case _:
                assert_never(message)

    def worker_lost(self, from_outside: bool) -> None:
        """Back to the queue, to run by itself with nothing of the lost attempt kept."""
        self.state = next_job_state(self.state, JobEvent.WORKER_LOST)
        self.deaths += 1
        self.killed_from_outside += from_outside
        self.worker, self.left_worker = None, self.worker
        self.alone, self.phase, self.step = True, None, 0
        self.pictures.clear()

    def ended(self, event: JobEvent, outcome: Outcome) -> None:
        self.state = next_job_state(self.state, event)
        self.outcome = outcome
        self.tell(Ended())

    def let_go(self) -> None:
        """Of the pictures, given and made, once it is answered. One that was given up keeps what
        it was given: its worker may yet die of it, which is remembered by the whole request."""
        self.pictures.clear()
        if self.outcome is not None:
            self.outcome.pictures.clear()
        given_up = self.state in (JobState.CANCELLED, JobState.EXPIRED)
        if isinstance(self.message, messages.Generate) and not given_up:
            self.message = msgspec.structs.replace(self.message, images={})

    def outcome_of(self, answer: Answered) -> tuple[JobEvent, Outcome]:
        """How it ends by its worker's answer."""
        match answer:
            case messages.Finished():
                missing = self.expected_pictures - len(self.pictures)
                if not missing:
                    pictures = [self.pictures[index] for index in sorted(self.pictures)]
                    return JobEvent.FINISHED, Outcome(pictures=pictures, finished=answer)
                detail = f"cannot answer: {missing} pictures are missing"
                problem = Problem("generation_failed", detail)
            case messages.Rejected():
                problem = Problem(answer.code, answer.detail, field=answer.field)
            case messages.Failed():
                problem = Problem(answer.code, answer.detail)
            case messages.Cancelled():
                problem = Problem("cancelled", "cannot go on: the worker gave the job up")
            case _:
                assert_never(answer)
        return JobEvent.FAILED, Outcome(problem=problem)

    def expected_steps(self) -> int:
        """Denoising steps over all calls; 0 for a job that makes no picture."""
        if not isinstance(self.message, messages.Generate):
            return 0
        if self.steps:
            return self.steps
        each = self.message.parameters.get("num_inference_steps") or GUESSED_STEPS
        return int(each) * len(self.message.calls)

    def work_seconds(self, estimates: Estimates) -> float:
        """What its steps still need on a device that does nothing else."""
        steps = max(self.expected_steps() - self.step, 0)
        return steps * estimates.steps.expected(self.kind)

    def running_seconds(
        self, estimates: Estimates, rows: int, now: float, *, loaded: bool
    ) -> float:
        """Where it runs as one of so many: what is left of its steps, and before its model is
        `loaded`, when none of them is done, of the swap; both by the time since it last moved."""
        work = self.work_seconds(estimates)
        # As long as a worker that is well may be silent: one that hangs is not about to be done.
        since = min(now - self.moved_at, UNFOLLOWED_SECONDS)
        if loaded or self.phase not in (None, "loading"):
            return max(work - since / slowdown(rows), 0.0)
        swap = estimates.swaps.expected(self.model) if self.swaps else 0.0
        return work + max(swap - since, 0.0)

    @property
    def expected_pictures(self) -> int:
        return len(self.message.calls) if isinstance(self.message, messages.Generate) else 0

    def outgoing(self, late_seconds: float) -> messages.Generate | messages.Load | messages.Unload:
        """The message for the worker that takes the job now; signs of progress and pictures may be
        `late_seconds` late where nobody looks on."""
        if isinstance(self.message, messages.Generate):
            late = 0.0 if self.followed else late_seconds
            replace = msgspec.structs.replace
            return replace(self.message, alone=self.alone, progress_seconds=late)
        return self.message

    def view(self, estimates: Estimates) -> JobView:
        return JobView(
            id=self.id,
            model=self.model,
            work_seconds=self.work_seconds(estimates),
            swap_seconds=estimates.swaps.expected(self.model),
            alone=self.alone,
            worker=self.pinned_worker,
            avoids=self.left_worker,
        )


def in_order(
    jobs: Iterable[Job], running: Iterable[Job], served_at: Mapping[str, float], now: float
) -> list[Job]:
    """Queued jobs as they should be served.

    Callers take turns: each caller's first job comes before anybody's second, and what a
    caller has running counts as before. Within a turn the caller goes first who has waited
    longest since it was served last, or since its oldest job came. A caller's own jobs go
    by priority, where waiting counts, and by age.
    """
    ahead = Counter(job.caller for job in running)
    by_urgency = sorted(jobs, key=lambda job: (-_urgency(job, now), job.accepted_at))
    waits_since: dict[str, float] = {}
    for job in by_urgency:
        oldest = min(job.accepted_at, waits_since.get(job.caller, job.accepted_at))
        waits_since[job.caller] = oldest
    turns = []
    for job in by_urgency:
        since = max(waits_since[job.caller], served_at.get(job.caller, -math.inf))
        turns.append((ahead[job.caller], since, job))
        ahead[job.caller] += 1
    return [job for *_, job in sorted(turns, key=lambda turn: turn[:2])]


def _urgency(job: Job, now: float) -> float:
    return job.priority + (now - job.accepted_at) / SECONDS_PER_PRIORITY


def overdue(jobs: Iterable[Job], now: float) -> list[Job]:
    return [job for job in jobs if now >= job.deadline]
