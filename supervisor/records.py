"""What is remembered of each request: its job, its answer, its idempotency key.

A record is kept while its job runs and, where its caller may come back for the answer,
JOB_RETENTION_SECONDS after it ended; its id is remembered for as long again, to tell a
forgotten job from an unknown one.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeVar

import anyio
import msgspec

from supervisor.errors import Problem
from supervisor.jobs import Job
from supervisor.preparation import Prepared
from supervisor.requests import GenerateBody

Key = TypeVar("Key")
Entry = TypeVar("Entry")


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
    _told_when_done: list[Callable[[], object]] = field(default_factory=list)

    def when_done(self, told: Callable[[], object]) -> None:
        """`told` is called once the answer is there, which may be at once."""
        if self.done.is_set():
            told()
        else:
            self._told_when_done.append(told)

    def take(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.job.take(prepared.message)

    def end(self, now: float, answer: bytes | None = None, problem: Problem | None = None) -> None:
        self.answer, self.problem, self.ended_at = answer, problem, now
        self.done.set()
        waiting, self._told_when_done = self._told_when_done, []
        for told in waiting:
            told()

    def let_go(self) -> None:
        """Of what only the work needed: from now on its answer is all that is asked for."""
        self.job.let_go()
        self.body = GenerateBody()
        self.prepared = msgspec.structs.replace(self.prepared, message=self.job.message, inputs={})

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
    at: float
    """When it was made, by the monotonic clock."""
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

    def drop(self, id: str) -> None:
        """Forgets a job before its time, as one that was answered to whoever waited for it."""
        if self._records.pop(id, None) is not None:
            self._forgotten[id] = self._now()

    def find(self, id: str) -> Record:
        """Raises Problem for an id that is unknown or forgotten."""
        self.forget()
        record = self._records.get(id)
        if record is not None and not self._is_over(record):
            return record
        if record is not None or id in self._forgotten:
            raise Problem("forgotten", "cannot show the job: its result is no longer kept")
        raise Problem("not_found", "cannot find a job of this id")

    def claim(self, caller: str, key: str, body: bytes) -> Claim:
        """The key's claim: a new one without a record, or the one that it is a repeat of.

        Raises Problem when the key came with another body, or is still at work.
        """
        self.forget()
        digest = hashlib.blake2b(body, digest_size=16).digest()
        known = self._claims.get((caller, key))
        if known is None or self._is_stale(known):
            self._claims.pop((caller, key), None)  # the new one goes to the end
            claim = self._claims[caller, key] = Claim(digest, self._now())
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
        """Lets go of what ended long enough ago, the oldest first.

        Called for every request, so it looks at no more than may have to go: all three
        tables are in the order in which their entries came.
        """
        now, limit = self._now(), self._retention_seconds
        for id, record in _while(self._records, lambda each: now - each.accepted_at >= limit):
            if self._is_over(record):
                self.drop(id)
        for id, _ in _while(self._forgotten, lambda at: now - at >= limit + 60):
            del self._forgotten[id]
        for key, claim in _while(self._claims, lambda each: now - each.at >= limit):
            if self._is_stale(claim):
                del self._claims[key]

    def _is_over(self, record: Record) -> bool:
        ended_at = record.ended_at
        return ended_at is not None and self._now() - ended_at >= self._retention_seconds

    def _is_stale(self, claim: Claim) -> bool:
        return claim.record is not None and self._is_over(claim.record)


def _while(table: dict[Key, Entry], holds: Callable[[Entry], bool]) -> list[tuple[Key, Entry]]:
    """The entries at the front for which it holds."""
    return list(takewhile(lambda item: holds(item[1]), table.items()))
