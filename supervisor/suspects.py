"""Requests that were by themselves on a worker when it died: what is refused as poison.

Pure: time is an argument, in seconds. A suspicion is forgotten after a while, and at
once when the same request succeeds.
"""

import hashlib

import msgspec

from ipc import messages
from supervisor.placement import SUSPICIONS_BEFORE_POISON

POISON_SECONDS = 600.0

Work = messages.Generate | messages.Load | messages.Unload


class Suspects:
    """Suspicions by what a request asks for, whatever its id and seeds."""

    def __init__(self) -> None:
        self._suspicions: dict[bytes, tuple[int, float]] = {}

    def died_with(self, message: Work, now: float) -> int:
        """Counts one more; returns how many there are."""
        self._forget(now)
        key = fingerprint(message)
        count = self._suspicions.get(key, (0, 0.0))[0] + 1
        self._suspicions[key] = (count, now + POISON_SECONDS)
        return count

    def succeeded(self, message: Work) -> None:
        if self._suspicions:  # a fingerprint reads all of the request's pictures
            self._suspicions.pop(fingerprint(message), None)

    def are_poison(self, message: Work, now: float) -> bool:
        self._forget(now)
        if not self._suspicions:
            return False
        return self._suspicions.get(fingerprint(message), (0, 0.0))[0] >= SUSPICIONS_BEFORE_POISON

    def _forget(self, now: float) -> None:
        self._suspicions = {
            key: (count, until) for key, (count, until) in self._suspicions.items() if until > now
        }


def fingerprint(message: Work) -> bytes:
    """The same for requests that differ in nothing but their id, seeds and priority."""
    same = msgspec.structs.replace(message, job="")
    if isinstance(same, messages.Generate):
        calls = [msgspec.structs.replace(call, seed=0, metadata={}) for call in same.calls]
        same = msgspec.structs.replace(same, calls=calls, alone=False, priority=0)
    return hashlib.blake2b(msgspec.msgpack.encode(same), digest_size=16).digest()
