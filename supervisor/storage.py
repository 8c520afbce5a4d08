"""Stored pictures: files of IMAGE_DIR that are whole, durable and never overwritten.

It knows names and bytes, nothing of requests or webhooks. A picture is written to a
hidden file of the same folder, synced, and linked to its name, which must be free.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anyio import CancelScope, to_thread

from supervisor.errors import Problem
from supervisor.quota import Quota
from supervisor.settings import SettingsError

MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
BATCH_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
NAME = re.compile(BATCH_ID.pattern + r"-[0-9]{1,4}\.(jpg|png|webp)")
HIGHEST_INDEX = 15

# EFBIG is the file size limit of a process (`ulimit -f`).
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def check_batch_id(batch_id: str) -> None:
    """Raises Problem("invalid_request")."""
    if not BATCH_ID.fullmatch(batch_id):
        detail = (
            "cannot use this batch_id: it takes 1 to 100 of A-Z a-z 0-9 . _ - "
            "and does not begin with a dot"
        )
        raise Problem("invalid_request", detail, field="batch_id")


def check_writable(variable: str, folder: Path) -> None:
    """Makes the folder if need be. Raises SettingsError when files cannot be made in it.

    A full disk is no reason to stop the start: what cannot be stored is answered so.
    """
    probe = folder / f".writable-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb"):
            pass
        probe.unlink()
    except OSError as error:
        if error.errno in FULL and folder.is_dir():
            return
        reason = error.strerror or type(error).__name__
        raise SettingsError(
            f"cannot use {variable}={folder}: the folder cannot be written ({reason})"
        ) from None


class Storage:
    """The pictures of one folder. Its methods are called from the event loop."""

    def __init__(self, folder: Path, quota: Quota) -> None:
        self._folder = folder
        self.quota = quota
        self._batches: dict[str, list[str]] = {}

    async def start(self) -> None:
        """Removes what an earlier crash left half written."""
        await to_thread.run_sync(_remove_leftovers, self._folder)

    async def reserve(self, batch_id: str) -> None:
        """Keeps a batch id for one job, until `release` or `discard`.

        Raises Problem("invalid_request") or Problem("batch_id_exists").
        """
        check_batch_id(batch_id)
        if batch_id in self._batches:
            raise _batch_id_exists(batch_id)
        self._batches[batch_id] = []
        kept = False
        try:
            kept = not await to_thread.run_sync(self._exists, batch_id)
        finally:
            if not kept:
                del self._batches[batch_id]
        if not kept:
            raise _batch_id_exists(batch_id)

    def release(self, batch_id: str) -> None:
        """The job has ended, its pictures stay. Releasing what is not reserved is no error."""
        self._batches.pop(batch_id, None)

    async def discard(self, batch_id: str) -> None:
        """The job has failed: removes what it stored since `reserve`, so that it can be redone."""
        names = self._batches.pop(batch_id, [])
        await to_thread.run_sync(self._remove, names)

    async def store(self, batch_id: str, index: int, extension: str, data: bytes) -> str:
        """Stores one picture of a reserved batch, for good; its name in the folder.

        Raises Problem: "storage_full", "batch_id_exists", "internal_error" when the disk
        refuses for another reason. Then nothing of the picture is left.
        """
        name = f"{batch_id}-{index}.{extension}"
        if not NAME.fullmatch(name):
            raise Problem("internal_error", "cannot store the picture: its name is not valid")
        with CancelScope(shield=True):  # what is on disk is to be known to `discard`
            await to_thread.run_sync(self._write, name, data)
            self._batches.setdefault(batch_id, []).append(name)
        return name

    def path(self, name: str) -> Path:
        """Where a stored picture is, for the image.stored event."""
        return self._folder / name

    async def open_image(self, name: str) -> tuple[Path, str]:
        """The file and media type of a stored picture. Raises Problem("not_found")."""
        match = NAME.fullmatch(name)
        if match is None or not await to_thread.run_sync(_is_plain_file, self.path(name)):
            raise Problem("not_found", "cannot find a stored picture of this name")
        return self.path(name), MEDIA_TYPES[match[1]]

    def _exists(self, batch_id: str) -> bool:
        # By name: listing a folder of a million pictures would take a second.
        return any(
            os.path.lexists(self._folder / f"{batch_id}-{index}.{extension}")
            for index in range(HIGHEST_INDEX + 1)
            for extension in MEDIA_TYPES
        )

    def _remove(self, names: list[str]) -> None:
        for name in names:
            with suppress(OSError):
                size = self.path(name).stat().st_size
                self.path(name).unlink()
                self.quota.subtract(self._folder, size)

    def _write(self, name: str, data: bytes) -> None:
        with _named_problems(name), self.quota.room(self._folder, len(data)):
            temporary = self._folder / f".{name}.tmp"
            with open(temporary, "xb") as file:
                try:
                    _mark_in_use(file.fileno())
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    _link(temporary, self.path(name))
                finally:
                    temporary.unlink(missing_ok=True)
            _sync_new_file(self.path(name))


def _batch_id_exists(batch_id: str) -> Problem:
    return Problem("batch_id_exists", f"cannot use the batch_id {batch_id}: it is taken")


@contextmanager
def _named_problems(name: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise _batch_id_exists(name.rpartition("-")[0]) from None
    except OSError as error:
        if error.errno in FULL:
            raise Problem("storage_full", "cannot store the picture: the disk is full") from error
        reason = error.strerror or type(error).__name__
        raise Problem("internal_error", f"cannot store the picture: {reason}") from error


def _mark_in_use(descriptor: int) -> None:
    """For another server that starts on the same folder: this is no leftover."""
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name. Raises FileExistsError rather than overwrite."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        _claim_and_rename(source, target)


def _claim_and_rename(source: Path, target: Path) -> None:
    """For file systems without hard links (FAT, SMB): replaces an empty file of our own."""
    with open(target, "xb"):
        pass
    try:
        os.replace(source, target)
    except BaseException:
        target.unlink()
        raise


def _sync_new_file(path: Path) -> None:
    """Makes the file's name durable, or removes the file."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
