"""The quota of DATA_DIR: what counts, what goes, what never goes."""

import os
import shutil
from pathlib import Path

import anyio
import pytest

from supervisor.errors import Problem
from supervisor.quota import (
    Entry,
    Quota,
    cache_entries,
    choose_evictions,
    measure,
    remove,
    remove_leftovers,
)

HUB = Path("/data/cache/hub")
OLD = Entry(HUB / "old", 10, 1.0)
MIDDLE = Entry(HUB / "middle", 20, 2.0)
NEW = Entry(HUB / "new", 30, 3.0)
EMPTY = Entry(HUB / "empty", 0, 0.0)


@pytest.mark.parametrize(
    ("needed_bytes", "pinned", "chosen"),
    [
        (0, [], []),
        (-5, [], []),
        (1, [], [OLD]),
        (10, [], [OLD]),
        (11, [], [OLD, MIDDLE]),
        (60, [], [OLD, MIDDLE, NEW]),
        (61, [], None),
        (1, [OLD.path], [MIDDLE]),
        (1, [OLD.path / "snapshots" / "abc"], [MIDDLE]),
        (1, [HUB], None),
        (1, [HUB / "ol"], [OLD]),
        (51, [OLD.path], None),
        (50, [OLD.path], [MIDDLE, NEW]),
        (1, [OLD.path, MIDDLE.path, NEW.path], None),
    ],
)
def test_the_least_recently_used_go_first_and_nothing_in_use(
    needed_bytes: int, pinned: list[Path], chosen: list[Entry] | None
) -> None:
    assert choose_evictions([NEW, EMPTY, OLD, MIDDLE], pinned, needed_bytes) == chosen


def write(path: Path, size_bytes: int, used: float = 1000.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size_bytes))
    os.utime(path, (used, used))
    return path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """350 bytes that stay, 100 + 200 + 300 that may go, the oldest first."""
    write(tmp_path / "images" / "b-0.png", 100)
    write(tmp_path / "models" / "checkpoints" / "a.safetensors", 200)
    write(tmp_path / "outbox.sqlite3", 50)
    write(tmp_path / "cache" / "converted" / "first.safetensors", 100, used=1.0)
    repository = tmp_path / "cache" / "hub" / "models--org--second"
    blob = write(repository / "blobs" / "abc", 200, used=2.0)
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "snapshots" / "1" / "a.safetensors").symlink_to(blob)
    write(tmp_path / "cache" / "converted" / "third.safetensors", 300, used=3.0)
    return tmp_path


def cached(data_dir: Path) -> list[str]:
    return sorted(entry.path.name for entry in cache_entries(data_dir))


def test_everything_under_the_folder_counts_once(data_dir: Path) -> None:
    quota = Quota(data_dir, 0)
    quota.walk()
    assert quota.used_bytes == 950


def test_files_that_come_and_go_are_counted_without_a_walk(data_dir: Path) -> None:
    quota = Quota(data_dir, 0)
    quota.add(data_dir / "images", 70)
    quota.subtract(data_dir / "cache", 20)
    assert quota.used_bytes == 50


def test_a_folder_elsewhere_has_no_quota(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    quota = Quota(data_dir, limit_bytes=1)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with quota.room(elsewhere, 1000):
        pass
    quota.add(elsewhere, 1000)
    assert quota.used_bytes == 0


def test_room_is_made_by_removing_the_least_recently_used(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=950)
    quota.walk()
    quota.make_room(100)
    assert cached(data_dir) == ["models--org--second", "third.safetensors"]
    quota.make_room(101)
    assert cached(data_dir) == ["third.safetensors"]
    assert quota.used_bytes == 650
    assert not list((data_dir / "cache").glob("*/.*"))


def test_what_is_in_use_stays_and_so_do_pictures_models_and_the_outbox(data_dir: Path) -> None:
    pinned = {data_dir / "cache" / "hub" / "models--org--second" / "snapshots" / "1"}
    quota = Quota(data_dir, 950, lambda: pinned)
    quota.walk()
    quota.make_room(400)
    assert cached(data_dir) == ["models--org--second"]
    with pytest.raises(Problem, match=r"cannot store .* GB: the data folder holds") as caught:
        quota.make_room(401)
    assert caught.value.code == "storage_full"
    assert str(data_dir) not in caught.value.detail
    assert measure(data_dir / "images").bytes == 100
    assert measure(data_dir / "models").bytes == 200
    assert measure(data_dir / "outbox.sqlite3").bytes == 50


def test_nothing_goes_when_all_of_it_would_not_suffice(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=1000)
    quota.walk()
    with pytest.raises(Problem):
        quota.make_room(900)
    assert len(cached(data_dir)) == 3


def test_no_limit_is_no_limit(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=0)
    quota.walk()
    quota.make_room(2**60)
    assert len(cached(data_dir)) == 3


def test_what_others_removed_is_found_before_anything_goes(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=1000)
    quota.walk()
    (data_dir / "models" / "checkpoints" / "a.safetensors").unlink()
    quota.make_room(200)
    assert len(cached(data_dir)) == 3


def test_room_is_promised_while_a_file_is_written(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=1500, pinned=lambda: {data_dir})
    quota.walk()
    with quota.room(data_dir / "images", 400):
        with pytest.raises(Problem):
            quota.make_room(200)
        write(data_dir / "images" / "b-1.png", 400)
    assert quota.used_bytes == 1350


def test_a_promise_is_taken_back_when_the_write_fails(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=0)
    with pytest.raises(OSError, match="broken"), quota.room(data_dir, 600):
        raise OSError("broken")
    assert quota.used_bytes == 0


def test_a_use_is_noted_without_changing_the_time_of_change(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=0)
    link = data_dir / "cache/hub/models--org--second/snapshots/1/a.safetensors"
    changed = link.stat().st_mtime_ns
    quota.touch(link)
    entries = sorted(cache_entries(data_dir), key=lambda entry: entry.last_used)
    assert [entry.path.name for entry in entries][-1] == "models--org--second"
    assert link.stat().st_mtime_ns == changed


def test_a_use_outside_the_cache_is_none_of_its_business(data_dir: Path) -> None:
    picture = data_dir / "images" / "b-0.png"
    Quota(data_dir, limit_bytes=0).touch(picture)
    assert picture.stat().st_atime == 1000.0


def test_locks_records_and_files_being_written_are_no_entries(data_dir: Path) -> None:
    before = cached(data_dir)
    for name in ("a.lock", "a.tmp", "a.incomplete", ".locks", "igi"):
        write(data_dir / "cache" / "converted" / name, 10)
    write(data_dir / "cache" / "stray", 10)
    assert cached(data_dir) == before


def test_an_eviction_that_a_crash_cut_short_is_finished_at_start(data_dir: Path) -> None:
    write(data_dir / "cache" / "hub" / ".models--x-1.evicted" / "blobs" / "a", 10)
    write(data_dir / "cache" / "converted" / ".a-1.evicted", 10)
    before = cached(data_dir)
    remove_leftovers(data_dir.resolve())
    assert not list(data_dir.rglob("*.evicted"))
    assert cached(data_dir) == before


def test_removing_a_link_leaves_what_it_points_to(data_dir: Path) -> None:
    link = data_dir / "cache" / "hub" / "link"
    link.symlink_to(data_dir / "models")
    remove(link)
    assert not link.is_symlink()
    assert measure(data_dir / "models").bytes == 200


def test_a_folder_that_is_not_there_measures_nothing(tmp_path: Path) -> None:
    assert measure(tmp_path / "nowhere") == Entry(tmp_path / "nowhere", 0, 0.0)


def test_the_watch_measures_at_once(data_dir: Path) -> None:
    quota = Quota(data_dir, limit_bytes=0)

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(quota.watch)
            while not quota.used_bytes:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    with_deadline(scenario)
    shutil.rmtree(data_dir / "images")
    quota.walk()
    assert quota.used_bytes == 850


def with_deadline(scenario: object) -> None:
    async def limited() -> None:
        with anyio.fail_after(10):
            await scenario()  # type: ignore[operator]

    anyio.run(limited)
