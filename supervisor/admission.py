"""Whether a job is accepted: a pure decision over what is known when it comes."""

import math

import msgspec

from supervisor.errors import Problem


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What admission looks at. Times are in seconds."""

    draining: bool = False
    drain_seconds: float = 30.0
    is_poison: bool = False
    has_worker: bool = True
    """Some worker that the job may run on serves or will serve again."""
    queued: int = 0
    max_queue: int = 64
    place_seconds: float = 1.0
    """Expected until somebody leaves the queue."""
    expected_seconds: float | None = None
    """Expected until this job is done; None where only a guess could be made."""
    left_seconds: float = math.inf
    """Until the job's deadline."""


def refusal(situation: Situation) -> Problem | None:
    """Why the job cannot be accepted, or None."""
    now = situation
    if now.draining:
        return draining(now.drain_seconds)
    if now.is_poison:
        return Problem("poison", "cannot accept the job: the same request has ended two workers")
    if not now.has_worker:
        return Problem("unavailable", "cannot accept the job: no worker is left", retry_after=30)
    if now.queued >= now.max_queue:
        detail = f"cannot accept the job: the queue is full ({now.queued} of {now.max_queue})"
        return Problem("queue_full", detail, retry_after=whole_seconds(now.place_seconds))
    if now.expected_seconds is not None and now.expected_seconds > now.left_seconds:
        detail = (f"cannot finish within {max(now.left_seconds, 0):.3g} s: "
                  f"about {now.expected_seconds:.3g} s are needed")  # fmt: skip
        wait = now.expected_seconds - now.left_seconds
        return Problem("too_late", detail, field="timeout_seconds",
                       retry_after=whole_seconds(wait))  # fmt: skip
    return None


def draining(drain_seconds: float) -> Problem:
    return Problem("draining", "cannot accept the job: the server is stopping",
                   retry_after=whole_seconds(drain_seconds))  # fmt: skip


def whole_seconds(seconds: float) -> int:
    """For Retry-After: at least 1."""
    return max(math.ceil(seconds), 1)
