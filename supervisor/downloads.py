"""How far downloads are: measured by the files that grow, told to whoever waits for them.

The hub's library knows several ways to fetch a file; what they have in common is the file.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

Told = Callable[[str, float], None]
"""Called from any thread, with a model's name and the fraction of its bytes that is there."""

listener: ContextVar[Told | None] = ContextVar("listener", default=None)
"""Who is told of the downloads that calls in this context wait for."""
LOOK_SECONDS = 0.5


class Downloads:
    """Who waits for which download. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Callable[[float], None]]] = {}
        self._fractions: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def waited_for(self, key: str, name: str) -> Iterator[None]:
        """This context's listener is told of a download, by whomever it is made."""
        told = listener.get()
        if told is None:
            yield
            return

        def tell(fraction: float) -> None:
            told(name, fraction)

        with self._lock:
            self._waiting.setdefault(key, []).append(tell)
            so_far = self._fractions.get(key)
        if so_far is not None:
            tell(so_far)
        try:
            yield
        finally:
            with self._lock:
                self._waiting[key].remove(tell)
                if not self._waiting[key]:
                    del self._waiting[key]

    @contextmanager
    def under_way(self, key: str, bytes_there: Callable[[], int], total: int) -> Iterator[None]:
        """Tells of a download at its begin, and then whenever it has got on."""
        ended = threading.Event()

        def look() -> None:
            before = -1
            while True:
                if (now := bytes_there()) != before:
                    self._tell(key, min(now / max(total, 1), 1.0))
                    before = now
                if ended.wait(LOOK_SECONDS):
                    return

        watcher = threading.Thread(target=look, name="download", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            with self._lock:
                self._fractions.pop(key, None)

    def _tell(self, key: str, fraction: float) -> None:
        with self._lock:
            self._fractions[key] = fraction
            waiting = tuple(self._waiting.get(key, ()))
        for tell in waiting:
            tell(fraction)


def incomplete_bytes(folder: Path) -> int:
    """What lies in a repository's files that are still written."""
    found = 0
    for path in folder.glob("blobs/*.incomplete"):
        try:
            found += path.stat().st_size
        except OSError:  # it was completed meanwhile
            continue
    return found
