"""Whose turn it is when workers are replaced one at a time. Pure."""

from collections.abc import Iterable


class Rotation:
    """Worker ids that are still to be replaced; the first one's turn it is."""

    def __init__(self) -> None:
        self._waiting: list[int] = []

    def requested(self, ids: Iterable[int]) -> int | None:
        """All of them are to be replaced. The one to begin with, unless one is under way."""
        under_way = bool(self._waiting)
        self._waiting += [id for id in ids if id not in self._waiting]
        return None if under_way or not self._waiting else self._waiting[0]

    def came_back(self, id: int) -> int | None:
        """A worker is ready again, or never will be. The next one, if it was its turn."""
        was_its_turn = self._waiting[:1] == [id]
        self._waiting = [waiting for waiting in self._waiting if waiting != id]
        return self._waiting[0] if was_its_turn and self._waiting else None
