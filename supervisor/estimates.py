"""What steps and swaps have cost so far, in seconds: the numbers behind placement.

Pure. Each figure is an exponential moving average per model, falling back to the
mean over other models, then to a guess that is never used to refuse a job.
"""

from supervisor.placement import slowdown

GUESSED_STEP_SECONDS = 0.1
GUESSED_SWAP_SECONDS = 2.0
WEIGHT = 0.3
"""Of the newest measurement."""


class Averages:
    """Averages by model."""

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._seconds: dict[str, float] = {}

    def measured(self, model: str, seconds: float) -> None:
        before = self._seconds.get(model, seconds)
        self._seconds[model] = seconds * WEIGHT + before * (1 - WEIGHT)

    def knows(self, model: str) -> bool:
        return model in self._seconds

    def expected(self, model: str) -> float:
        if model in self._seconds:
            return self._seconds[model]
        known = self._seconds.values()
        return sum(known) / len(known) if known else self._guess


class Estimates:
    """Seconds per denoising step of one picture that has the device to itself, and per swap."""

    def __init__(self) -> None:
        self.steps = Averages(GUESSED_STEP_SECONDS)
        self.swaps = Averages(GUESSED_SWAP_SECONDS)

    def stepped(self, model: str, step_seconds: float, batch_rows: float | None) -> None:
        """A job's steps took so long, each as one of `batch_rows` pictures' on the average."""
        self.steps.measured(model, step_seconds / slowdown(batch_rows or 1.0))
