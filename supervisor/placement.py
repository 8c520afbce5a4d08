"""Decisions about work: which worker, admit or refuse, retry or give up, when to restart.

Pure functions of values. The expected completion time of a job on a worker is

    what the worker has ahead of it + the swap, if the model is not there + the work,

and the least wins. So the worker that holds the model wins while its queue is not
much longer than a swap, and loses after that: then the model gains a second home.
"""

import enum
from collections.abc import Sequence

import msgspec

SLOWEST_RESTART_SECONDS = 30.0
FIRST_RESTART_SECONDS = 0.25
STARTS_BEFORE_QUARANTINE = 5
DEATHS_ALONE = 2
DEATHS_AT_ALL = 3


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """What placement sees of a ready worker. Times are in seconds."""

    id: int
    capacity: int = 1
    running: int = 0
    exclusive: bool = False
    """A job runs that must have the worker to itself."""
    busy_seconds: float = 0.0
    """Expected until all that runs has ended."""
    resident: frozenset[str] = frozenset()


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """What placement sees of a queued job."""

    id: str
    model: str
    work_seconds: float = 1.0
    swap_seconds: float = 2.0
    """To load the model where it is not; the same for all workers, so that ties stay ties."""
    alone: bool = False
    worker: int | None = None
    """The only worker that may take it, when a caller named one."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Where each queued job would run, which can go now, and the expected completion."""

    workers: dict[str, int]
    dispatches: list[tuple[str, int]]
    completion_seconds: dict[str, float]


class _Load:
    """A worker while a plan is made: what it will have once the plan is carried out."""

    def __init__(self, view: WorkerView) -> None:
        self.view = view
        self.resident = set(view.resident)
        self.ahead_seconds = view.busy_seconds
        self.free = 0 if view.exclusive else view.capacity - view.running
        self.waiting = 0

    def completion_seconds(self, job: JobView) -> float:
        return self.ahead_seconds + self.swap_seconds(job) + job.work_seconds

    def swap_seconds(self, job: JobView) -> float:
        return 0.0 if job.model in self.resident else job.swap_seconds

    def rank(self, job: JobView) -> tuple[float, int, int, int]:
        """Least first: completion, then emptiness, so that models spread out."""
        crowd = len(self.resident) + self.waiting + self.view.running
        return (round(self.completion_seconds(job), 3), crowd, -self.free, self.view.id)

    def takes_now(self, job: JobView) -> bool:
        idle = self.view.running == 0 and self.free == self.view.capacity
        return self.free > 0 and self.waiting == 0 and (idle or not job.alone)

    def add(self, job: JobView) -> bool:
        """Plans the job here; true when it can go at once."""
        now = self.takes_now(job)
        share = 1 if job.alone else self.view.capacity
        self.ahead_seconds += self.swap_seconds(job) + job.work_seconds / share
        self.resident.add(job.model)
        self.waiting += not now
        self.free -= (self.view.capacity if job.alone else 1) if now else 0
        return now


def plan(jobs: Sequence[JobView], workers: Sequence[WorkerView]) -> Plan:
    """Places queued jobs, given in the order in which they should be served."""
    loads = {worker.id: _Load(worker) for worker in workers}
    result = Plan(workers={}, dispatches=[], completion_seconds={})
    for job in jobs:
        able = [load for id, load in loads.items() if job.worker in (None, id)]
        if not able:
            continue
        best = min(able, key=lambda load: load.rank(job))
        result.workers[job.id] = best.view.id
        result.completion_seconds[job.id] = best.completion_seconds(job)
        if best.add(job):
            result.dispatches.append((job.id, best.view.id))
    return result


class Verdict(enum.Enum):
    """What becomes of a job whose worker died under it."""

    AGAIN = "again"
    POISON = "poison"
    WORKER_LOST = "worker_lost"


def after_death(deaths: int, deaths_alone: int, killed_from_outside: bool) -> Verdict:
    """`deaths` and `deaths_alone` count this one.

    Only a job that was by itself when its worker died can be to blame, and only
    if nobody else killed the worker.
    """
    if deaths_alone >= DEATHS_ALONE:
        return Verdict.WORKER_LOST if killed_from_outside else Verdict.POISON
    return Verdict.WORKER_LOST if deaths >= DEATHS_AT_ALL else Verdict.AGAIN


def restart_delay_seconds(failures: int, random: float) -> float:
    """Doubles with each failure in a row; `random` in [0, 1) spreads it by a quarter."""
    if failures == 0:
        return 0.0
    delay = FIRST_RESTART_SECONDS * 2.0 ** min(failures - 1, 16)
    return min(delay, SLOWEST_RESTART_SECONDS) * (1 + random / 4)


def is_hopeless(failed_starts: int) -> bool:
    """True when a worker has died before it was ready too often in a row."""
    return failed_starts >= STARTS_BEFORE_QUARANTINE
