"""What steps and swaps have cost so far, in seconds: the numbers behind placement.

Pure. Each figure is an exponential moving average, per device and model, falling
back to what other devices saw, then to a guess that is never used to refuse a job.
"""

GUESSED_STEP_SECONDS = 0.1
GUESSED_SWAP_SECONDS = 2.0
WEIGHT = 0.3
"""Of the newest measurement."""


class Averages:
    """Averages by (device, model)."""

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._by_pair: dict[tuple[int, str], float] = {}
        self._by_model: dict[str, float] = {}

    def measured(self, device: int, model: str, seconds: float) -> None:
        for table, key in ((self._by_pair, (device, model)), (self._by_model, model)):
            _blend(table, key, seconds)

    def knows(self, model: str) -> bool:
        return model in self._by_model

    def expected(self, device: int, model: str) -> float:
        known = self._by_pair.get((device, model), self._by_model.get(model))
        if known is not None:
            return known
        return sum(self._by_model.values()) / len(self._by_model) if self._by_model else self._guess

    def mean(self, device: int) -> float | None:
        """Over the models seen on this device; None before the first."""
        seen = [seconds for (id, _), seconds in self._by_pair.items() if id == device]
        return sum(seen) / len(seen) if seen else None


def _blend(table: dict, key: object, seconds: float) -> None:  # type: ignore[type-arg]
    table[key] = seconds * WEIGHT + table.get(key, seconds) * (1 - WEIGHT)


class Estimates:
    """Seconds per denoising step and per swap."""

    def __init__(self) -> None:
        self.steps = Averages(GUESSED_STEP_SECONDS)
        self.swaps = Averages(GUESSED_SWAP_SECONDS)
