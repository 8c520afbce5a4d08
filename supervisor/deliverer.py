"""The deliverer: the task that carries events from the outbox to their addresses.

At least once, always under the same id. The addresses are the operator's own, so any
of them may be told, private ones too.
"""

import logging
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TypeVar, assert_never

import anyio
import anyio.abc
import httpx
from anyio import to_thread

from supervisor.outbox import Due, Event, Outbox, next_attempt
from supervisor.settings import Settings
from supervisor.webhooks import (
    Answered,
    Dead,
    Delivered,
    Retry,
    Unanswered,
    decide,
    signature,
    signing_key,
)

ATTEMPT_SECONDS = 30.0
CONCURRENT_ATTEMPTS = 4
"""For one address; each address has its own, so that one that hangs holds up no other."""
LONGEST_WAIT_SECONDS = 60.0
OUTBOX_RETRY_SECONDS = 5.0
SHORT_BODY_BYTES = 65_536
SHORT_BODY_SECONDS = 1.0

Schedule = Callable[[int, float], float | None]
Result = TypeVar("Result")

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs addresses, which may hold keys


@dataclass(slots=True)
class _Lane:
    """One address: the task that serves it sleeps until `wake`, or until `resume_at`."""

    url: str
    wake: anyio.Event = field(default_factory=anyio.Event)
    resume_at: float = 0.0


class Deliverer:
    """Carries events from the outbox to their addresses: `run` it as a task beside the app.

    What is pending from before a restart is delivered too. Nothing here waits for an
    endpoint but `run`; `put` takes as long as the disk needs.
    """

    def __init__(
        self,
        outbox: Outbox,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        schedule: Schedule = next_attempt,
        attempt_seconds: float = ATTEMPT_SECONDS,
    ) -> None:
        """Raises SettingsError for a secret that is not base64."""
        self._outbox = outbox
        self._clock = clock
        self._schedule = schedule
        self._attempt_seconds = attempt_seconds
        self._key = signing_key(settings.webhook_secret) if settings.webhook_secret else None
        self._headers = _fixed_headers(settings)
        self._lanes: dict[str, _Lane] = {}
        self._group: anyio.abc.TaskGroup | None = None
        self._closing = anyio.Event()
        self._ended = anyio.Event()

    async def put(self, events: Sequence[Event]) -> list[str]:
        """Keeps all of the events or none, for good, and has them delivered; their ids.

        Raises Problem("storage_full").
        """
        with anyio.CancelScope(shield=True):  # a caller that goes must not cost the wake-up
            ids = await to_thread.run_sync(self._outbox.put, events, self._clock())
        for event in events:
            self._wake(event.url)
        return ids

    async def run(self) -> None:
        """Delivers until `aclose`. Call it once."""
        try:
            async with _client() as self._client, anyio.create_task_group() as self._group:
                for url in await self._call(self._outbox.urls):
                    self._wake(url)
                await self._closing.wait()
        finally:
            self._group = None
            self._ended.set()

    async def aclose(self, seconds: float) -> None:
        """Delivers what is due now, as far as `seconds` suffice; the rest stays in the outbox.

        The outbox can be closed after this.
        """
        self._closing.set()
        for lane in self._lanes.values():
            lane.wake.set()
        if self._group is None:
            return
        with anyio.move_on_after(seconds):
            await self._ended.wait()
        if self._group is not None:
            self._group.cancel_scope.cancel()
            await self._ended.wait()

    def _wake(self, url: str) -> None:
        if self._group is None:
            return
        if url not in self._lanes:
            self._lanes[url] = _Lane(url)
            self._group.start_soon(self._serve, self._lanes[url])
        self._lanes[url].wake.set()

    async def _serve(self, lane: _Lane) -> None:
        while True:
            lane.wake = anyio.Event()  # before the look, so that no event falls in between
            due = await self._due(lane)
            if due:
                async with anyio.create_task_group() as group:
                    for event in due:
                        group.start_soon(self._deliver, lane, event)
            elif self._closing.is_set():
                return
            else:
                await self._sleep(lane)

    async def _due(self, lane: _Lane) -> list[Due]:
        now = self._clock()
        if now < lane.resume_at:
            return []
        return await self._call(self._outbox.due, lane.url, now, CONCURRENT_ATTEMPTS)

    async def _sleep(self, lane: _Lane) -> None:
        due = await self._call(self._outbox.next_due, lane.url)
        seconds = LONGEST_WAIT_SECONDS  # at most: the clock may be set back
        if due is not None:
            seconds = min(seconds, max(due, lane.resume_at) - self._clock())
        with anyio.move_on_after(seconds):
            await lane.wake.wait()

    async def _deliver(self, lane: _Lane, due: Due) -> None:
        body = await self._call(self._outbox.payload, due.id)
        if body is None:
            return
        result = await self._post(lane.url, due.id, body)
        pause = self._schedule(due.attempts + 1, random.random())
        outcome = decide(result, self._clock(), pause)
        match outcome:
            case Delivered():
                await self._call(self._outbox.delivered, due.id)
            case Retry(at, reason, all_events):
                if all_events:
                    lane.resume_at = max(lane.resume_at, at)
                log.info("cannot deliver %s %s yet: %s", due.event, due.id, reason)
                await self._call(self._outbox.retry, due.id, at, reason)
            case Dead(reason):
                log.error("cannot deliver %s %s, given up: %s", due.event, due.id, reason)
                await self._call(self._outbox.dead, due.id, reason)
            case _:
                assert_never(outcome)

    async def _post(self, url: str, identifier: str, body: bytes) -> Answered | Unanswered:
        headers = self._headers | self._signed(identifier, body)
        try:
            with anyio.fail_after(self._attempt_seconds):
                async with self._client.stream("POST", url, content=body, headers=headers) as it:
                    await _read_short_body(it)
                    return Answered(it.status_code, it.headers.get("retry-after"))
        except TimeoutError:
            return Unanswered(f"no answer within {self._attempt_seconds:g} seconds")
        except Exception as error:  # httpx lets ValueError, UnicodeError and others through
            return Unanswered(f"no answer: {type(error).__name__}")

    def _signed(self, identifier: str, body: bytes) -> dict[str, str]:
        timestamp = int(self._clock())
        headers = {"webhook-id": identifier, "webhook-timestamp": str(timestamp)}
        if self._key is not None:
            headers["webhook-signature"] = signature(self._key, identifier, timestamp, body)
        return headers

    async def _call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """A call of the outbox, repeated while the disk refuses it."""
        while True:
            try:
                with anyio.CancelScope(shield=True):  # what was delivered is to be noted
                    return await to_thread.run_sync(partial(function, *arguments))
            except sqlite3.Error as error:
                log.error("cannot use the outbox: %s", error)
                await anyio.sleep(OUTBOX_RETRY_SECONDS)


def _fixed_headers(settings: Settings) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "user-agent": "image-generation-inference",
        "accept-encoding": "identity",
    }
    if settings.webhook_auth_header and settings.webhook_auth_value:
        headers[settings.webhook_auth_header.lower()] = settings.webhook_auth_value
    return headers


def _client() -> httpx.AsyncClient:
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    return httpx.AsyncClient(timeout=None, follow_redirects=False, cookies=no_cookies)


async def _read_short_body(response: httpx.Response) -> None:
    """Reads a body that is known to be short, so that the connection can be used again.

    Any other body is left unread, which closes the connection.
    """
    length = "0" if response.status_code == 204 else response.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and int(length[:9]) <= SHORT_BODY_BYTES):
        return
    with anyio.move_on_after(SHORT_BODY_SECONDS), suppress(httpx.HTTPError):
        async for _ in response.aiter_raw():
            pass
