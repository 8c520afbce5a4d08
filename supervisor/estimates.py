"""What steps and swaps have cost so far, in seconds: the numbers behind placement.

Pure. Each figure is an exponential moving average per kind of work, falling back to the
mean over other kinds, then to a guess that is never used to refuse a job.
"""

from supervisor.placement import slowdown

GUESSED_STEP_SECONDS = 0.1
GUESSED_SWAP_SECONDS = 2.0
WEIGHT = 0.3
"""Of the newest measurement."""
MAX_KINDS = 1000
"""Callers choose sizes of pictures, so kinds could grow without end."""


class Averages:
    """Averages by kind; those measured longest ago are forgotten."""

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._seconds: dict[str, float] = {}

    def measured(self, kind: str, seconds: float) -> None:
        before = self._seconds.pop(kind, seconds)
        self._seconds[kind] = seconds * WEIGHT + before * (1 - WEIGHT)
        if len(self._seconds) > MAX_KINDS:
            del self._seconds[next(iter(self._seconds))]

    def knows(self, kind: str) -> bool:
        return kind in self._seconds

    def expected(self, kind: str) -> float:
        if kind in self._seconds:
            return self._seconds[kind]
        known = self._seconds.values()
        return sum(known) / len(known) if known else self._guess


class Estimates:
    """Seconds per denoising step of one picture that has the device to itself, and per swap."""

    def __init__(self) -> None:
        self.steps = Averages(GUESSED_STEP_SECONDS)
        self.swaps = Averages(GUESSED_SWAP_SECONDS)

    def stepped(self, kind: str, step_seconds: float, batch_rows: float | None) -> None:
        """A job's steps took so long, each as one of `batch_rows` pictures' on the average."""
        self.steps.measured(kind, step_seconds / slowdown(batch_rows or 1.0))
