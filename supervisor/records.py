"""What is remembered of each request: its job, its answer, its idempotency key.

A record is kept while its job runs and JOB_RETENTION_SECONDS after it ended; its
id is remembered for as long again, to tell a forgotten job from an unknown one.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from supervisor.errors import Problem
from supervisor.jobs import Job
from supervisor.preparation import Prepared
from supervisor.requests import GenerateBody


@dataclass(slots=True, eq=False)
class Record:
    """A request that was accepted. `done` is set once `answer` or `problem` is."""

    job: Job
    body: GenerateBody
    prepared: Prepared
    batch_id: str
    accepted_at: float
    detached: bool = False
    """Runs on when its caller leaves."""
    answer: bytes | None = None
    problem: Problem | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    ended_at: float | None = None

    def end(self, now: float, answer: bytes | None = None, problem: Problem | None = None) -> None:
        self.answer, self.problem, self.ended_at = answer, problem, now
        self.done.set()

    def result(self) -> bytes:
        """The answer's JSON. Raises the Problem that the request ended with."""
        if self.problem is not None:
            raise self.problem
        assert self.answer is not None
        return self.answer


@dataclass(slots=True)
class Claim:
    """An idempotency key in use: by which body, for which record once there is one."""

    digest: bytes
    record: Record | None = None


class Records:
    """Records by job id, and claims by caller and idempotency key."""

    def __init__(
        self, retention_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._retention_seconds = retention_seconds
        self._now = clock
        self._records: dict[str, Record] = {}
        self._claims: dict[tuple[str, str], Claim] = {}
        self._forgotten: dict[str, float] = {}

    def add(self, record: Record) -> None:
        self._records[record.job.id] = record
        self.forget()

    def find(self, id: str) -> Record:
        """Raises Problem for an id that is unknown or forgotten."""
        self.forget()
        if id in self._records:
            return self._records[id]
        if id in self._forgotten:
            raise Problem("forgotten", "cannot show the job: its result is no longer kept")
        raise Problem("not_found", "cannot find a job of this id")

    def claim(self, caller: str, key: str, body: bytes) -> Claim:
        """The key's claim: a new one without a record, or the one that it is a repeat of.

        Raises Problem when the key came with another body, or is still at work.
        """
        self.forget()
        digest = hashlib.blake2b(body, digest_size=16).digest()
        known = self._claims.get((caller, key))
        if known is None:
            claim = self._claims[caller, key] = Claim(digest)
            return claim
        if known.digest != digest:
            raise Problem("key_reused", "cannot use this idempotency key for another request")
        if known.record is None or not known.record.done.is_set():
            raise Problem("key_in_use", "cannot answer yet: the request with this key still runs",
                          retry_after=1)  # fmt: skip
        return known

    def unclaim(self, caller: str, key: str) -> None:
        """The request was refused before it became a job: the key is free again."""
        self._claims.pop((caller, key), None)

    def forget(self) -> None:
        """Lets go of what ended long enough ago."""
        now, limit = self._now(), self._retention_seconds
        for id, record in list(self._records.items()):
            if record.ended_at is not None and now - record.ended_at >= limit:
                del self._records[id]
                self._forgotten[id] = now
        self._forgotten = {id: at for id, at in self._forgotten.items() if now - at < limit + 60}
        live = self._records
        self._claims = {
            key: claim
            for key, claim in self._claims.items()
            if claim.record is None or claim.record.job.id in live
        }
