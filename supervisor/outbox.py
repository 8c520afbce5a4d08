"""The outbox: events kept in SQLite from the moment they happen until they are delivered.

It knows nothing of HTTP. Every call is short and blocks: make it from a thread. Time is
an argument, in Unix seconds. An event is on disk for good when `put` returns.
"""

import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from supervisor.errors import Problem

RETRY_SECONDS = (1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 21_600.0, 86_400.0)
JITTER = 0.2
DEAD_LETTERS_KEPT = 1000

# Payloads are apart, so that counting an attempt does not rewrite a picture.
# auto_vacuum gives the room of delivered pictures back to the disk.
SCHEMA = """
PRAGMA auto_vacuum = FULL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA journal_size_limit = 16777216;
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    event TEXT NOT NULL,
    url TEXT NOT NULL,
    created REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    due REAL, -- NULL: a dead letter
    reason TEXT
);
CREATE INDEX IF NOT EXISTS events_due ON events (url, due, number);
CREATE INDEX IF NOT EXISTS events_dead ON events (number) WHERE due IS NULL;
CREATE TABLE IF NOT EXISTS payloads (number INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TRIGGER IF NOT EXISTS payload_goes AFTER DELETE ON events
BEGIN DELETE FROM payloads WHERE number = old.number; END;
"""


class Event(NamedTuple):
    """What happened (`image.stored`, …), whom to tell, and the body to tell it with."""

    event: str
    url: str
    payload: bytes


class Due(NamedTuple):
    """An event whose time has come; `attempts` were made before."""

    id: str
    event: str
    attempts: int


class DeadLetter(NamedTuple):
    """An event that was given up, and why. `created` is in Unix seconds."""

    id: str
    event: str
    url: str
    created: float
    attempts: int
    reason: str


def next_attempt(attempts: int, random: float) -> float | None:
    """Seconds from the failure of the attempt number `attempts` (from 1) to the next.

    None: there is no next. `random`, from 0 to 1, spreads the attempts of many events:
    up to a fifth is added, nothing is taken away.
    """
    if attempts > len(RETRY_SECONDS):
        return None
    return RETRY_SECONDS[attempts - 1] * (1.0 + JITTER * random)


class Outbox:
    """One SQLite file, one process. Methods raise sqlite3.Error when the disk refuses.

    The file is opened by the first call and not before, so that a full disk does not
    keep the server from starting.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def put(self, events: Sequence[Event], now: float) -> list[str]:
        """Keeps all of the events or none; answers their ids (`msg_…`), which never change.

        Raises Problem("storage_full").
        """
        ids = [f"msg_{secrets.token_hex(16)}" for _ in events]
        try:
            with self._transaction() as connection:
                for identifier, event in zip(ids, events, strict=True):
                    _insert(connection, identifier, event, now)
        except sqlite3.OperationalError as error:
            detail = f"cannot keep the event in the outbox: {error}"
            raise Problem("storage_full", detail) from error
        return ids

    def urls(self) -> list[str]:
        """Every address that something is pending for."""
        rows = self._read("SELECT DISTINCT url FROM events WHERE due IS NOT NULL ORDER BY url")
        return [url for (url,) in rows]

    def due(self, url: str, now: float, limit: int) -> list[Due]:
        """At most `limit` events for one address whose time has come, the oldest first."""
        rows = self._read(
            "SELECT id, event, attempts FROM events WHERE url = ? AND due <= ?"
            " ORDER BY due, number LIMIT ?",
            url, now, limit,
        )  # fmt: skip
        return [Due(*row) for row in rows]

    def next_due(self, url: str) -> float | None:
        """When the next event for an address is due, in Unix seconds; None: none is pending."""
        due: float | None = self._read("SELECT min(due) FROM events WHERE url = ?", url)[0][0]
        return due

    def payload(self, identifier: str) -> bytes | None:
        """None: the event is not kept any more."""
        rows = self._read(
            "SELECT payload FROM payloads JOIN events USING (number) WHERE id = ?", identifier
        )
        return rows[0][0] if rows else None

    def delivered(self, identifier: str) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM events WHERE id = ?", (identifier,))

    def retry(self, identifier: str, at: float, reason: str) -> None:
        """Counts a failed attempt; the event is due again at `at`."""
        with self._transaction() as connection:
            _count_failure(connection, identifier, at, reason)

    def dead(self, identifier: str, reason: str) -> None:
        """Counts a failed attempt, the last one. Only the newest dead letters are kept."""
        with self._transaction() as connection:
            _count_failure(connection, identifier, None, reason)
            connection.execute(
                "DELETE FROM events WHERE due IS NULL AND number <= (SELECT number FROM events"
                " WHERE due IS NULL ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (DEAD_LETTERS_KEPT,),
            )

    def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The newest first."""
        rows = self._read(
            "SELECT id, event, url, created, attempts, reason FROM events"
            " WHERE due IS NULL ORDER BY number DESC LIMIT ?",
            limit,
        )
        return [DeadLetter(*row) for row in rows]

    def pending_count(self) -> int:
        return self._count("due IS NOT NULL")

    def dead_count(self) -> int:
        return self._count("due IS NULL")

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _count(self, condition: str) -> int:
        count: int = self._read(f"SELECT count(*) FROM events WHERE {condition}")[0][0]
        return count

    def _read(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        with self._transaction() as connection:
            return connection.execute(query, arguments).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._opened() as connection:
            yield connection

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, check_same_thread=False)
            try:
                connection.executescript(SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def _insert(connection: sqlite3.Connection, identifier: str, event: Event, now: float) -> None:
    number = connection.execute(
        "INSERT INTO events (id, event, url, created, due) VALUES (?, ?, ?, ?, ?)",
        (identifier, event.event, event.url, now, now),
    ).lastrowid
    connection.execute("INSERT INTO payloads VALUES (?, ?)", (number, event.payload))


def _count_failure(
    connection: sqlite3.Connection, identifier: str, due: float | None, reason: str
) -> None:
    connection.execute(
        "UPDATE events SET attempts = attempts + 1, due = ?, reason = ? WHERE id = ?",
        (due, reason, identifier),
    )
