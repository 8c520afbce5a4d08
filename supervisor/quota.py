"""The quota of DATA_DIR: how much it holds, and what goes when there is no more room.

What may go is what lies in DATA_DIR/cache/{kind}/{entry}: a downloaded repository,
compiled code. An entry goes whole or not at all; pictures and the outbox never go.
Methods block on the disk (make them from a thread) unless they say otherwise.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import anyio
from anyio import to_thread

from supervisor.errors import Problem
from supervisor.settings import GB

CACHE = "cache"
KEPT_SUFFIXES = (".lock", ".tmp", ".incomplete")
"""Locks, and files that somebody still writes."""
KEPT_NAMES = {"igi"}
"""In the hub's folder, the records of what was downloaded: without them no model is found."""
WALK_SECONDS = 600.0


class Entry(NamedTuple):
    """A file or folder of the cache. `last_used` is in Unix seconds."""

    path: Path
    bytes: int
    last_used: float


def choose_evictions(
    entries: Iterable[Entry], pinned: Collection[Path], needed_bytes: int
) -> list[Entry] | None:
    """The entries that go, least recently used first; None: all together do not suffice.

    An entry stays that is pinned, holds what is pinned, or lies in what is pinned.
    """
    chosen: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.last_used, entry.path)):
        if needed_bytes <= 0:
            break
        if entry.bytes > 0 and not any(_overlap(entry.path, path) for path in pinned):
            chosen.append(entry)
            needed_bytes -= entry.bytes
    return chosen if needed_bytes <= 0 else None


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def nothing_pinned() -> set[Path]:
    return set()


class Quota:
    """Counts what DATA_DIR holds as files come and go; `limit_bytes` 0 is no limit.

    `pinned` names the files and folders in use, whenever it is asked, from any thread.
    """

    def __init__(
        self,
        data_dir: Path,
        limit_bytes: int,
        pinned: Callable[[], Collection[Path]] = nothing_pinned,
    ) -> None:
        self._data_dir = data_dir.resolve()
        self.limit_bytes = limit_bytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._measured_bytes = 0
        self._promised_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What DATA_DIR holds, with what is being written. Never blocks."""
        return self._measured_bytes + self._promised_bytes

    def walk(self) -> None:
        """Measures anew, which also finds what others wrote. At start, then now and then."""
        measured = measure(self._data_dir).bytes
        with self._lock:
            self._measured_bytes = measured

    async def watch(self, seconds: float = WALK_SECONDS) -> None:
        """Finishes what an earlier crash left, then walks now and every so often, for ever."""
        await to_thread.run_sync(remove_leftovers, self._data_dir)
        while True:
            await to_thread.run_sync(self.walk)
            await anyio.sleep(seconds)

    @contextmanager
    def room(self, folder: Path, size_bytes: int) -> Iterator[None]:
        """Makes room for a file of `folder`, which the body writes; counted if it succeeds.

        Raises Problem("storage_full"). A folder outside DATA_DIR has no quota.
        """
        if not self._covers(folder):
            yield
            return
        with self._lock:
            self._make_room(size_bytes)
            self._promised_bytes += size_bytes
        written = False
        try:
            yield
            written = True
        finally:
            with self._lock:
                self._promised_bytes -= size_bytes
                self._measured_bytes += size_bytes if written else 0

    def make_room(self, size_bytes: int) -> None:
        """Evicts until `size_bytes` more would fit. Raises Problem("storage_full")."""
        with self._lock:
            self._make_room(size_bytes)

    def add(self, folder: Path, size_bytes: int) -> None:
        """A file was written without `room`."""
        if self._covers(folder):
            with self._lock:
                self._measured_bytes += size_bytes

    def subtract(self, folder: Path, size_bytes: int) -> None:
        """A file was removed."""
        self.add(folder, -size_bytes)

    def touch(self, path: Path) -> None:
        """A file of the cache, or a file in one of its folders, is being used."""
        with suppress(ValueError):
            kind, entry, *_ = path.resolve().relative_to(self._data_dir / CACHE).parts
            _set_access_times(self._data_dir / CACHE / kind / entry)

    def _covers(self, folder: Path) -> bool:
        return folder.resolve().is_relative_to(self._data_dir)

    def _make_room(self, size_bytes: int) -> None:
        if not self.limit_bytes or self.used_bytes + size_bytes <= self.limit_bytes:
            return
        # Before anything is lost or refused, what others removed is found.
        self._measured_bytes = measure(self._data_dir).bytes
        excess = self.used_bytes + size_bytes - self.limit_bytes
        pinned = {path.resolve() for path in self._pinned()}
        chosen = choose_evictions(cache_entries(self._data_dir), pinned, excess)
        if chosen is None:
            self._refuse(size_bytes)
        for entry in chosen:
            remove(entry.path)
            self._measured_bytes -= entry.bytes

    def _refuse(self, size_bytes: int) -> NoReturn:
        raise Problem(
            "storage_full",
            f"cannot store {size_bytes / GB:.3f} GB: the data folder holds"
            f" {self.used_bytes / GB:.3f} of {self.limit_bytes / GB:.3f} GB",
        )


def cache_entries(data_dir: Path) -> list[Entry]:
    """Everything that may go, in no order. Sizes and times are read from the disk."""
    paths = [
        Path(entry.path)
        for kind in _listed(data_dir / CACHE)
        if kind.is_dir(follow_symlinks=False)
        for entry in _listed(Path(kind.path))
        if _may_go(entry.name)
    ]
    return [measure(path) for path in paths]


def _may_go(name: str) -> bool:
    return not (name.startswith(".") or name.endswith(KEPT_SUFFIXES) or name in KEPT_NAMES)


def measure(path: Path) -> Entry:
    """The size of a file or of all files under a folder, and their latest use.

    Links count nothing and are not followed. What goes away meanwhile counts nothing.
    """
    size, last_used = 0, 0.0
    for status in _file_statuses(path):
        size += status.st_size
        last_used = max(last_used, status.st_atime, status.st_mtime)
    return Entry(path, size, last_used)


def remove(path: Path) -> None:
    """Removes a file or a folder; nobody sees half of a folder."""
    hidden = path.with_name(f".{path.name}-{time.time_ns()}.evicted")
    with suppress(OSError):
        path.rename(hidden)
        if hidden.is_dir() and not hidden.is_symlink():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink()


def remove_leftovers(data_dir: Path) -> None:
    """Finishes evictions that a crash cut short."""
    for hidden in (data_dir / CACHE).glob("*/.*.evicted"):
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(OSError):
            hidden.unlink()


def _set_access_times(path: Path) -> None:
    # Set by hand: most disks are mounted so that reading notes the time once a day or never.
    # The time of change stays: it is part of what a file's content is remembered by.
    now = time.time_ns()
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with suppress(OSError):
            status = file.lstat()
            os.utime(file, ns=(now, status.st_mtime_ns), follow_symlinks=False)


def _file_statuses(path: Path) -> Iterator[os.stat_result]:
    if path.is_symlink():
        return
    folders = [path]
    while folders:
        folder = folders.pop()
        for entry in _listed(folder):
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif not entry.is_symlink():
                    yield entry.stat(follow_symlinks=False)
    if not path.is_dir():
        with suppress(OSError):
            yield path.lstat()


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
