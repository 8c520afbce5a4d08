"""The outbox: what is kept, when it is due, and how long it is tried."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor import outbox as outbox_module
from supervisor.errors import Problem
from supervisor.outbox import DeadLetter, Due, Event, Outbox, next_attempt

HERE = "http://here/"
THERE = "http://there/"


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    it = Outbox(tmp_path / "outbox.sqlite3")
    yield it
    it.close()


def event(url: str = HERE, payload: bytes = b"{}", name: str = "image.stored") -> Event:
    return Event(name, url, payload)


def test_an_event_is_due_from_the_moment_it_is_kept(outbox: Outbox) -> None:
    [identifier] = outbox.put([event(payload=b'{"a": 1}')], now=100.0)
    assert identifier.startswith("msg_")
    assert outbox.due(HERE, now=100.0, limit=10) == [Due(identifier, "image.stored", 0)]
    assert outbox.payload(identifier) == b'{"a": 1}'
    assert outbox.urls() == [HERE]


def test_events_come_out_in_the_order_they_went_in(outbox: Outbox) -> None:
    identifiers = [outbox.put([event()], now=100.0)[0] for _ in range(5)]
    assert [due.id for due in outbox.due(HERE, 100.0, limit=3)] == identifiers[:3]


def test_each_address_has_its_own_events(outbox: Outbox) -> None:
    here, there = outbox.put([event(HERE), event(THERE)], now=100.0)
    assert [due.id for due in outbox.due(HERE, 100.0, 10)] == [here]
    assert [due.id for due in outbox.due(THERE, 100.0, 10)] == [there]


def test_what_was_delivered_is_kept_no_longer(outbox: Outbox) -> None:
    [identifier] = outbox.put([event()], now=100.0)
    outbox.delivered(identifier)
    assert outbox.due(HERE, 1e9, 10) == []
    assert outbox.payload(identifier) is None
    assert outbox.pending_count() == 0


def test_a_failed_event_waits_for_its_time_and_keeps_its_id(outbox: Outbox) -> None:
    [identifier] = outbox.put([event()], now=100.0)
    outbox.retry(identifier, at=130.0, reason="answered 500")
    assert outbox.due(HERE, 129.0, 10) == []
    assert outbox.next_due(HERE) == 130.0
    assert outbox.due(HERE, 130.0, 10) == [Due(identifier, "image.stored", 1)]


def test_a_dead_letter_is_never_due_and_says_why(outbox: Outbox) -> None:
    [identifier] = outbox.put([event()], now=100.0)
    outbox.retry(identifier, at=130.0, reason="answered 500")
    outbox.dead(identifier, "answered 410")
    assert outbox.due(HERE, 1e9, 10) == []
    assert outbox.next_due(HERE) is None
    assert outbox.urls() == []
    assert (outbox.pending_count(), outbox.dead_count()) == (0, 1)
    assert outbox.dead_letters() == [
        DeadLetter(identifier, "image.stored", HERE, 100.0, 2, "answered 410")
    ]


def test_only_the_newest_dead_letters_are_kept(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "DEAD_LETTERS_KEPT", 2)
    identifiers = outbox.put([event() for _ in range(4)], now=100.0)
    for identifier in identifiers:
        outbox.dead(identifier, "answered 410")
    assert [letter.id for letter in outbox.dead_letters()] == identifiers[:1:-1]
    assert outbox.payload(identifiers[0]) is None


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Outbox(tmp_path / "outbox.sqlite3")
    waiting, dead = first.put([event(), event(THERE)], now=100.0)
    first.retry(waiting, 130.0, "answered 500")
    first.dead(dead, "answered 410")
    first.close()
    second = Outbox(tmp_path / "outbox.sqlite3")
    assert second.due(HERE, 130.0, 10) == [Due(waiting, "image.stored", 1)]
    assert [letter.id for letter in second.dead_letters()] == [dead]
    second.close()


def test_all_events_are_kept_or_none(outbox: Outbox) -> None:
    broken = Event("image.stored", None, b"{}")  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        outbox.put([event(), broken], now=100.0)
    assert outbox.pending_count() == 0


def test_a_full_disk_is_a_problem_with_a_name(outbox: Outbox) -> None:
    outbox.put([event()], now=100.0)
    with outbox._transaction() as connection:
        connection.execute("PRAGMA max_page_count = 20")
    with pytest.raises(Problem, match=r"outbox: .*full") as caught:
        outbox.put([event(), event(payload=bytes(1_000_000))], now=100.0)
    assert caught.value.code == "storage_full"
    assert outbox.pending_count() == 1


def test_a_folder_that_comes_later_is_used_then(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "later" / "outbox.sqlite3")
    with pytest.raises(Problem, match="cannot keep the event"):
        outbox.put([event()], now=100.0)
    (tmp_path / "later").mkdir()
    assert len(outbox.put([event()], now=100.0)) == 1
    outbox.close()


def test_the_room_of_delivered_pictures_goes_back_to_the_disk(
    outbox: Outbox, tmp_path: Path
) -> None:
    identifiers = outbox.put([event(payload=bytes(250_000)) for _ in range(8)], now=100.0)
    for identifier in identifiers:
        outbox.delivered(identifier)
    outbox.close()  # which folds the journal in
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000


def test_every_commit_is_synced(outbox: Outbox) -> None:
    with outbox._transaction() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_attempts_follow_the_schedule_and_end() -> None:
    hours = 3600.0
    expected = [1.0, 5.0, 30.0, 120.0, 600.0, 1 * hours, 6 * hours, 24 * hours, None]
    assert [next_attempt(attempts, 0.0) for attempts in range(1, 10)] == expected


@pytest.mark.parametrize("attempts", range(1, 9))
def test_jitter_adds_up_to_a_fifth(attempts: int) -> None:
    least, most = next_attempt(attempts, 0.0), next_attempt(attempts, 1.0)
    assert least is not None
    assert most == pytest.approx(least * 1.2)
