"""Stored pictures: whole, durable, never overwritten, never outside their folder."""

import errno
import fcntl
import os
import resource
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import pytest

from supervisor.errors import Problem
from supervisor.quota import Quota
from supervisor.settings import SettingsError
from supervisor.storage import Storage, check_batch_id, check_writable

Result = TypeVar("Result")
BAD_BATCH_IDS = ["", ".a", "a" * 101, "a/b", "../a", "a b", "a\n", "a\0", "é", "a%2e", "\\a"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path, Quota(tmp_path, 0))


def wait(function: Callable[..., Awaitable[Result]], *arguments: object) -> Result:
    return anyio.run(function, *arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_picture_is_stored_under_its_batch_and_index(storage: Storage, tmp_path: Path) -> None:
    assert wait(storage.store, "b.1", 0, "jpg", b"picture") == "b.1-0.jpg"
    assert storage.path("b.1-0.jpg").read_bytes() == b"picture"
    assert names(tmp_path) == ["b.1-0.jpg"]


def test_a_stored_picture_can_be_opened(storage: Storage) -> None:
    wait(storage.store, "b", 0, "png", b"picture")
    assert wait(storage.open_image, "b-0.png") == (storage.path("b-0.png"), "image/png")


@pytest.mark.parametrize("batch_id", ["a", "A-0", "a.b", "_", "-", "a" * 100, "a..b"])
def test_a_batch_id_of_the_allowed_characters_is_taken(batch_id: str) -> None:
    check_batch_id(batch_id)


@pytest.mark.parametrize("batch_id", BAD_BATCH_IDS)
def test_any_other_batch_id_is_refused(storage: Storage, batch_id: str, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot use this batch_id") as caught:
        wait(storage.reserve, batch_id)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "batch_id")
    with pytest.raises(Problem, match="cannot store the picture"):
        wait(storage.store, batch_id, 0, "png", b"")
    assert names(tmp_path) == []


def test_a_batch_id_is_reserved_for_one_job(storage: Storage) -> None:
    wait(storage.reserve, "b")
    with pytest.raises(Problem) as caught:
        wait(storage.reserve, "b")
    assert caught.value.code == "batch_id_exists"
    storage.release("b")
    wait(storage.reserve, "b")


@pytest.mark.parametrize("name", ["b-0.jpg", "b-15.webp", "b-3.png"])
def test_a_batch_id_whose_files_exist_is_refused(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    for _ in range(2):
        with pytest.raises(Problem) as caught:
            wait(storage.reserve, "b")
        assert caught.value.code == "batch_id_exists"


def test_batch_ids_that_look_alike_do_not_meet(storage: Storage) -> None:
    wait(storage.store, "b-0", 0, "png", b"")
    wait(storage.reserve, "b")
    wait(storage.reserve, "b-0-0")


def test_nothing_is_overwritten(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "b-0.png").write_bytes(b"older")
    with pytest.raises(Problem) as caught:
        wait(storage.store, "b", 0, "png", b"newer")
    assert caught.value.code == "batch_id_exists"
    assert (tmp_path / "b-0.png").read_bytes() == b"older"
    assert names(tmp_path) == ["b-0.png"]


def test_a_failed_job_leaves_nothing_and_its_batch_id_free(
    storage: Storage, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await storage.reserve("b")
        await storage.store("b", 0, "png", b"one")
        await storage.store("b", 1, "png", b"two")
        await storage.discard("b")
        await storage.reserve("b")

    wait(scenario)
    assert names(tmp_path) == []


def test_pictures_of_an_ended_job_cannot_be_discarded(storage: Storage, tmp_path: Path) -> None:
    async def scenario() -> None:
        await storage.reserve("b")
        await storage.store("b", 0, "png", b"one")
        storage.release("b")
        await storage.discard("b")

    wait(scenario)
    assert names(tmp_path) == ["b-0.png"]


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_stops_half_way_leaves_no_file(storage: Storage, tmp_path: Path) -> None:
    with file_size_limit(1000), pytest.raises(Problem, match="the disk is full") as caught:
        wait(storage.store, "b", 0, "png", bytes(2000))
    assert caught.value.code == "storage_full"
    assert names(tmp_path) == []
    assert wait(storage.store, "b", 0, "png", bytes(2000)) == "b-0.png"


@pytest.mark.parametrize("action", ["fsync", "link"])
@pytest.mark.parametrize(
    ("code", "problem"),
    [(errno.ENOSPC, "storage_full"), (errno.EDQUOT, "storage_full"), (errno.EIO, "internal_error")],
)
def test_a_disk_that_refuses_at_the_end_leaves_no_file(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    action: str, code: int, problem: str,
) -> None:  # fmt: skip
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, action, refuse)
    with pytest.raises(Problem, match="cannot store") as caught:
        wait(storage.store, "b", 0, "png", b"picture")
    assert caught.value.code == problem
    assert str(tmp_path) not in caught.value.detail
    assert names(tmp_path) == []


def test_a_name_that_cannot_be_made_durable_is_taken_back(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with pytest.raises(Problem) as caught:
        wait(storage.store, "b", 0, "png", b"picture")
    assert caught.value.code == "storage_full"
    assert names(tmp_path) == []


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_hard_links")
def test_a_disk_without_hard_links_stores_too(storage: Storage, tmp_path: Path) -> None:
    wait(storage.store, "b", 0, "png", b"picture")
    assert (tmp_path / "b-0.png").read_bytes() == b"picture"
    with pytest.raises(Problem) as caught:
        wait(storage.store, "b", 0, "png", b"newer")
    assert caught.value.code == "batch_id_exists"
    assert (tmp_path / "b-0.png").read_bytes() == b"picture"
    assert names(tmp_path) == ["b-0.png"]


@pytest.mark.usefixtures("no_hard_links")
def test_a_rename_that_fails_leaves_no_empty_file(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(Problem) as caught:
        wait(storage.store, "b", 0, "png", b"picture")
    assert caught.value.code == "storage_full"
    assert names(tmp_path) == []


def test_leftovers_of_a_crash_are_removed_at_start(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / ".b-0.png.tmp").write_bytes(b"half")
    (tmp_path / "b-1.png").write_bytes(b"whole")
    wait(storage.start)
    assert names(tmp_path) == ["b-1.png"]


def test_what_another_server_is_writing_is_no_leftover(storage: Storage, tmp_path: Path) -> None:
    with open(tmp_path / ".b-0.png.tmp", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        wait(storage.start)
    assert names(tmp_path) == [".b-0.png.tmp"]


@pytest.mark.parametrize(
    "name",
    [
        "b-1.png", "b-0.gif", "b-0.png.tmp", ".b-0.png.tmp", "b-0.png\n", "b-0.PNG", "b-0",
        "../secret-0.png", "..%2fsecret-0.png", "/etc/passwd", "", ".", "..", "b-0.png\0",
        "linked-0.png", "folder-0.png", "a" * 300 + "-0.png", "sub/b-0.png", "dangling-0.png",
    ],
)  # fmt: skip
def test_what_is_no_stored_picture_is_not_found(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    (tmp_path.parent / "secret-0.png").touch()
    (tmp_path / "linked-0.png").symlink_to(tmp_path.parent / "secret-0.png")
    (tmp_path / "dangling-0.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder-0.png").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b-0.png").touch()
    (tmp_path / ".b-0.png.tmp").touch()
    with pytest.raises(Problem) as caught:
        wait(storage.open_image, name)
    assert caught.value.code == "not_found"


def test_a_picture_counts_towards_the_quota(tmp_path: Path) -> None:
    quota = Quota(tmp_path, limit_bytes=1000)
    storage = Storage(tmp_path / "images", quota)
    check_writable("IMAGE_DIR", tmp_path / "images")
    wait(storage.reserve, "b")
    wait(storage.store, "b", 0, "png", bytes(600))
    assert quota.used_bytes == 600
    with pytest.raises(Problem) as caught:
        wait(storage.store, "b", 1, "png", bytes(600))
    assert caught.value.code == "storage_full"
    wait(storage.discard, "b")
    assert quota.used_bytes == 0
    assert names(tmp_path / "images") == []


def test_a_folder_that_is_missing_is_made(tmp_path: Path) -> None:
    check_writable("DATA_DIR", tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot use IMAGE_DIR=.*: the folder cannot be writ"):
        check_writable("IMAGE_DIR", tmp_path / "file")


def test_a_full_disk_does_not_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", refuse)
    check_writable("DATA_DIR", tmp_path)
