"""Decisions about work: which worker, retry or give up, when to restart.

Pure functions of values; times are in seconds. A device's jobs share it: a step of n rows
takes `slowdown(n)` steps of one row. So a job of w seconds that joins jobs with r seconds
left each is done after w + MARGINAL_ROW * sum(min(r, w)), and one that has to wait for a
place after what is ahead of it. The swap, where the model is not there, comes on top, and
the least expected completion wins: the worker that holds the model does, until what is
ahead there exceeds a swap; then the model gains a second home. While other jobs wait, a
swap also counts for what it takes from each of them: its share of all the workers' time.
Without that, a busy fleet spends itself on swaps (docs/placement.md has the figures).
"""

import enum
from collections.abc import Iterator, Sequence

import msgspec

MARGINAL_ROW = 0.75
"""What a further row adds to a step, in steps of one row. Seen on one H200 with captured
graphs: 0.62 for SD1.5 512² at 8 rows, 0.93 for SDXL 1024² at 4; 1 means batching gains nothing."""

SLOWEST_RESTART_SECONDS = 30.0
FIRST_RESTART_SECONDS = 0.25
STARTS_BEFORE_QUARANTINE = 5
SUSPICIONS_BEFORE_POISON = 2
KILLS_BEFORE_GIVING_UP = 2
DEATHS_BEFORE_GIVING_UP = 3


def slowdown(rows: float) -> float:
    """How much longer a step of so many rows takes than a step of one."""
    return 1 + MARGINAL_ROW * (max(rows, 1.0) - 1)


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """What placement sees of a ready worker."""

    id: int
    capacity: int = 1
    running_seconds: tuple[float, ...] = ()
    """What each job that runs there would still need if it had the device to itself."""
    exclusive: bool = False
    """A job runs that must have the worker to itself."""
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
    avoids: int | None = None
    """The worker that died under it: another one takes it if there is any."""


class Placed(msgspec.Struct, frozen=True):
    """Where a queued job would run, in how many seconds it would be done, and if it can go."""

    job: str
    worker: int
    completion_seconds: float
    goes_now: bool


class _Load:
    """A worker while a plan is made: what it will have once the plan is carried out."""

    def __init__(self, view: WorkerView, others: float) -> None:
        self.others = others
        """Jobs that wait beside the one in question, per worker."""
        self.id = view.id
        self.capacity = view.capacity
        self.resident = set(view.resident)
        self.running = list(view.running_seconds)
        self.exclusive = view.exclusive
        self.waiting: list[float] = []

    @property
    def is_full(self) -> bool:
        return bool(self.waiting) or self.exclusive or len(self.running) >= self.capacity

    def takes_now(self, job: JobView) -> bool:
        return not self.is_full and not (job.alone and self.running)

    def swap_seconds(self, job: JobView) -> float:
        return 0.0 if job.model in self.resident else job.swap_seconds

    def own_seconds(self, job: JobView) -> float:
        return job.work_seconds + self.swap_seconds(job)

    def completion_seconds(self, job: JobView) -> float:
        own = self.own_seconds(job)
        if self.takes_now(job):
            return own + MARGINAL_ROW * sum(min(left, own) for left in self.running)
        share = slowdown(self.capacity) / self.capacity
        return max((sum(self.running) + sum(self.waiting) + own) * share, own)

    def rank(self, job: JobView) -> tuple[float, int, int]:
        """Least first: completion and what the swap costs others, then emptiness."""
        seconds = self.completion_seconds(job) + self.others * self.swap_seconds(job)
        crowd = len(self.resident) + len(self.running) + len(self.waiting)
        return (round(seconds, 3), crowd, self.id)

    def add(self, job: JobView) -> bool:
        """Plans the job here; true when it can go at once."""
        goes_now, own = self.takes_now(job), self.own_seconds(job)
        (self.running if goes_now else self.waiting).append(own)
        self.exclusive = self.exclusive or (goes_now and job.alone)
        self.resident.add(job.model)
        return goes_now


def plan(jobs: Sequence[JobView], workers: Sequence[WorkerView]) -> list[Placed]:
    """Places queued jobs, given in the order in which they should be served."""
    return list(_placed(jobs, _loads(jobs, workers)))


def dispatches(jobs: Sequence[JobView], workers: Sequence[WorkerView]) -> list[tuple[str, int]]:
    """The jobs that can go at once, with their workers; looks no further than it must."""
    loads = _loads(jobs, workers)
    going: list[tuple[str, int]] = []
    if not all(load.is_full for load in loads):
        for placed in _placed(jobs, loads):
            if placed.goes_now:
                going.append((placed.job, placed.worker))
            if all(load.is_full for load in loads):
                break
    return going


def _loads(jobs: Sequence[JobView], workers: Sequence[WorkerView]) -> list[_Load]:
    others = max(len(jobs) - 1, 0) / max(len(workers), 1)
    return [_Load(worker, others) for worker in workers]


def _placed(jobs: Sequence[JobView], loads: Sequence[_Load]) -> Iterator[Placed]:
    for job in jobs:
        able = [load for load in loads if job.worker in (None, load.id)]
        others = [load for load in able if load.id != job.avoids]
        if able:
            best = min(others or able, key=lambda load: load.rank(job))
            completion_seconds = best.completion_seconds(job)
            yield Placed(job.id, best.id, completion_seconds, best.add(job))


class Verdict(enum.Enum):
    """What becomes of a job whose worker died under it."""

    AGAIN = "again"
    POISON = "poison"
    WORKER_LOST = "worker_lost"


def after_death(deaths: int, killed_from_outside: int, suspicions: int) -> Verdict:
    """All counts include this death.

    A request is suspect only when it was by itself on a worker that died and that
    nobody else had killed. A job that lost its workers otherwise is given up at last.
    """
    if suspicions >= SUSPICIONS_BEFORE_POISON:
        return Verdict.POISON
    given_up = killed_from_outside >= KILLS_BEFORE_GIVING_UP or deaths >= DEATHS_BEFORE_GIVING_UP
    return Verdict.WORKER_LOST if given_up else Verdict.AGAIN


def restart_delay_seconds(failures: int, random: float) -> float:
    """Doubles with each failure in a row; `random` in [0, 1) spreads it by a quarter."""
    if failures == 0:
        return 0.0
    delay = FIRST_RESTART_SECONDS * 2.0 ** min(failures - 1, 16)
    return min(delay, SLOWEST_RESTART_SECONDS) * (1 + random / 4)


def is_hopeless(failed_starts: int) -> bool:
    """True when a worker has died before it was ready too often in a row."""
    return failed_starts >= STARTS_BEFORE_QUARANTINE
