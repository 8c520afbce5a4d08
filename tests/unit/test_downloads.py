"""Who is told of a download, and what: by the bytes that are there."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor import downloads
from supervisor.downloads import Downloads, incomplete_bytes


class Heard:
    """What one caller was told, and when there was something new."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []
        self._news = threading.Semaphore(0)

    def __call__(self, name: str, fraction: float) -> None:
        self.told.append((name, fraction))
        self._news.release()

    def wait(self) -> None:
        assert self._news.acquire(timeout=10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "LOOK_SECONDS", 0.001)


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    downloads.listener.set(heard)
    yield heard
    downloads.listener.set(None)


def test_a_listener_is_told_at_the_begin_and_whenever_the_files_have_grown(heard: Heard) -> None:
    kept, there = Downloads(), [0]
    with kept.waited_for("key", "org/model"), kept.under_way("key", lambda: there[0], 10):
        for grown in (0, 5, 12):
            there[0] = grown
            heard.wait()
    assert heard.told == [("org/model", 0.0), ("org/model", 0.5), ("org/model", 1.0)]


def test_whoever_comes_late_is_told_how_far_it_is_and_whoever_left_nothing(heard: Heard) -> None:
    kept, there = Downloads(), [5]
    with kept.waited_for("key", "one"), kept.under_way("key", lambda: there[0], 10):
        heard.wait()
        with kept.waited_for("key", "two"):
            heard.wait()
        there[0] = 10
        heard.wait()
    assert heard.told == [("one", 0.5), ("two", 0.5), ("one", 1.0)]
    with kept.waited_for("key", "three"):
        assert len(heard.told) == 3  # that download is over


def test_other_downloads_and_callers_who_do_not_listen_are_left_alone(heard: Heard) -> None:
    kept = Downloads()
    with kept.waited_for("other", "org/other"), kept.under_way("key", lambda: 1, 1):
        pass
    downloads.listener.set(None)
    with kept.waited_for("key", "org/model"), kept.under_way("key", lambda: 1, 1):
        pass
    assert heard.told == []


def test_files_that_are_still_written_count_by_their_size(tmp_path: Path) -> None:
    assert incomplete_bytes(tmp_path) == 0
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a.1.incomplete").write_bytes(bytes(7))
    (tmp_path / "blobs" / "b.2.incomplete").write_bytes(bytes(3))
    (tmp_path / "blobs" / "whole").write_bytes(bytes(100))
    (tmp_path / "blobs" / "gone.3.incomplete").symlink_to(tmp_path / "missing")
    assert incomplete_bytes(tmp_path) == 10
