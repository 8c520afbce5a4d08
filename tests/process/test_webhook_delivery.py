"""Delivery of webhooks to endpoints that fail in every way, and across kills."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from standardwebhooks import Webhook

from supervisor import deliverer as deliverer_module
from supervisor.deliverer import Deliverer
from supervisor.outbox import Event, Outbox
from supervisor.settings import Settings
from tests.tools.webhook_endpoint import Answer, Endpoint, Received, endpoint, free_port

SECRET = "whsec_" + b64encode(bytes(range(32))).decode()
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    it = Outbox(tmp_path / "outbox.sqlite3")
    yield it
    it.close()


def at_once(attempts: int, random: float) -> float | None:
    return 0.0


def twice(attempts: int, random: float) -> float | None:
    return 0.0 if attempts < 2 else None


@asynccontextmanager
async def delivering(deliverer: Deliverer) -> AsyncIterator[Deliverer]:
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(deliverer.run)
            yield deliverer
            await deliverer.aclose(seconds=30)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    anyio.run(main)


async def came(it: Endpoint, count: int) -> None:
    await to_thread.run_sync(it.wait_for_requests, count)


def event(url: str, payload: bytes = b'{"event": "image.stored"}') -> Event:
    return Event("image.stored", url, payload)


def deliver(
    outbox: Outbox,
    urls: list[str],
    schedule: Callable[[int, float], float | None] = at_once,
    attempt_seconds: float = 0.5,
) -> list[str]:
    """Puts one event per address and delivers until nothing is due; the ids."""
    identifiers: list[str] = []

    async def scenario() -> None:
        deliverer = Deliverer(
            outbox, Settings(), schedule=schedule, attempt_seconds=attempt_seconds
        )
        async with delivering(deliverer):
            identifiers.extend(await deliverer.put([event(url) for url in urls]))

    run(scenario)
    return identifiers


def failing(times: int, answer: Answer) -> Callable[[Received, int], Answer]:
    return lambda received, number: answer if number <= times else Answer()


def test_an_event_arrives_signed_with_its_headers_and_body(outbox: Outbox) -> None:
    settings = Settings(
        webhook_secret=SECRET, webhook_auth_header="X-Key", webhook_auth_value="open sesame"
    )

    async def scenario() -> None:
        async with delivering(Deliverer(outbox, settings)) as deliverer:
            await deliverer.put([event(it.url("/hook?token=1"), b'{"event": "image.stored"}')])

    with endpoint() as it:
        run(scenario)
    [received] = it.received
    assert received.path == "/hook?token=1"
    assert received.headers["x-key"] == "open sesame"
    assert received.headers["content-type"] == "application/json"
    assert Webhook(SECRET).verify(received.body, received.headers) == {"event": "image.stored"}
    assert outbox.pending_count() == 0


def test_without_a_secret_nothing_is_signed(outbox: Outbox) -> None:
    with endpoint() as it:
        [identifier] = deliver(outbox, [it.url()])
    assert it.received[0].id == identifier
    assert "webhook-signature" not in it.received[0].headers


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500),
        Answer(404),
        Answer(302, (("Location", "/elsewhere"),)),
        Answer(hang=True),
        Answer(raw=b""),
        Answer(raw=b"HTTP/1.1 200"),
        Answer(raw=b"\x00garbage\r\n\r\n"),
        Answer(500, endless=True),
    ],
    ids=["500", "404", "302", "hang", "no answer", "half an answer", "garbage", "endless 500"],
)
def test_an_event_that_failed_comes_again_under_the_same_id(outbox: Outbox, answer: Answer) -> None:
    with endpoint(failing(2, answer)) as it:
        [identifier] = deliver(outbox, [it.url("/hook")])
    assert [(received.path, received.id) for received in it.received] == [("/hook", identifier)] * 3
    assert outbox.pending_count() == 0
    assert outbox.dead_letters() == []


def test_each_attempt_is_signed_anew(outbox: Outbox) -> None:
    now = iter(range(1000, 2000))

    async def scenario() -> None:
        deliverer = Deliverer(
            outbox, Settings(webhook_secret=SECRET), schedule=at_once, clock=lambda: next(now)
        )
        async with delivering(deliverer):
            await deliverer.put([event(it.url())])

    with endpoint(failing(1, Answer(500))) as it:
        run(scenario)
    first, second = (received.headers for received in it.received)
    assert first["webhook-timestamp"] != second["webhook-timestamp"]
    assert first["webhook-signature"] != second["webhook-signature"]


def test_an_endpoint_that_is_down_gets_its_events_when_it_is_back(outbox: Outbox) -> None:
    port = free_port()
    failed = threading.Event()

    def schedule(attempts: int, random: float) -> float:
        failed.set()
        return 0.02

    async def scenario() -> None:
        async with delivering(Deliverer(outbox, Settings(), schedule=schedule)) as deliverer:
            await deliverer.put([event(f"http://127.0.0.1:{port}/")])
            await to_thread.run_sync(failed.wait)
            with endpoint(port=port) as it:
                await came(it, 1)
                await deliverer.aclose(30)

    run(scenario)
    assert outbox.pending_count() == 0


@pytest.mark.parametrize("url", ["http://[bad/", "http://nowhere.invalid/", "http://127.0.0.1:1/"])
def test_an_address_that_cannot_be_reached_ends_as_a_dead_letter(outbox: Outbox, url: str) -> None:
    [identifier] = deliver(outbox, [url], twice)
    [letter] = outbox.dead_letters()
    assert (letter.id, letter.attempts) == (identifier, 2)
    assert letter.reason.startswith("no answer")


def test_gone_is_a_dead_letter_at_once(outbox: Outbox) -> None:
    with endpoint(lambda received, number: Answer(410)) as it:
        [identifier] = deliver(outbox, [it.url()])
    assert it.count == 1
    [letter] = outbox.dead_letters()
    assert (letter.id, letter.reason) == (identifier, "answered 410")


def test_a_schedule_that_ends_leaves_a_dead_letter(outbox: Outbox) -> None:
    with endpoint(lambda received, number: Answer(500)) as it:
        deliver(outbox, [it.url()], twice)
    assert it.count == 2
    assert [letter.reason for letter in outbox.dead_letters()] == ["answered 500"]


@pytest.mark.parametrize("status", [429, 503])
def test_an_endpoint_that_asks_for_time_gets_it_for_all_its_events(
    outbox: Outbox, status: int
) -> None:
    times: list[float] = []

    def script(received: Received, number: int) -> Answer:
        times.append(time.monotonic())
        return Answer(status, (("Retry-After", "1"),)) if number == 1 else Answer()

    async def scenario() -> None:
        async with delivering(Deliverer(outbox, Settings(), schedule=at_once)) as deliverer:
            await deliverer.put([event(it.url())])
            await came(it, 1)
            while not outbox.due(it.url(), time.time() + 2, 1)[0].attempts:
                await anyio.lowlevel.checkpoint()  # until the answer is noted
            await deliverer.put([event(it.url())])
            await came(it, 3)

    with endpoint(script) as it:
        run(scenario)
    assert times[1] - times[0] >= 0.95
    assert times[2] - times[0] >= 0.95


def test_an_endless_answer_is_cut_off(outbox: Outbox) -> None:
    with endpoint(failing(1, Answer(200, endless=True))) as it:
        deliver(outbox, [it.url()])
        it.wait_for(lambda: it.bodies_cut == 1)
    assert it.count == 1
    assert outbox.pending_count() == 0


def test_an_endpoint_that_hangs_holds_up_no_other(outbox: Outbox) -> None:
    async def scenario() -> None:
        deliverer = Deliverer(outbox, Settings())
        async with delivering(deliverer):
            await deliverer.put([event(it.url()) for it in (hanging, well) for _ in range(50)])
            await came(well, 50)
            await came(hanging, 1)
            while outbox.urls() != [hanging.url()]:
                await anyio.lowlevel.checkpoint()  # until the last answers are noted
            await deliverer.aclose(seconds=0)

    with endpoint(lambda received, number: Answer(hang=True)) as hanging, endpoint() as well:
        run(scenario)
        assert hanging.count <= deliverer_module.CONCURRENT_ATTEMPTS
        assert outbox.pending_count() == 50


def test_closing_waits_for_what_is_due_and_no_longer(outbox: Outbox) -> None:
    async def scenario() -> None:
        deliverer = Deliverer(outbox, Settings())
        async with delivering(deliverer):
            await deliverer.put([event(it.url())])
            await came(it, 1)
            started = time.monotonic()
            await deliverer.aclose(seconds=0.2)
            assert 0.2 <= time.monotonic() - started < 2.0

    with endpoint(lambda received, number: Answer(hang=True)) as it:
        run(scenario)
    assert outbox.pending_count() == 1


def test_closing_what_never_ran_is_no_error(outbox: Outbox) -> None:
    run(lambda: Deliverer(outbox, Settings()).aclose(seconds=1))


def test_what_is_pending_from_before_is_delivered(outbox: Outbox) -> None:
    with endpoint() as it:
        [earlier] = outbox.put([event(it.url("/old"))], now=time.time())
        deliver(outbox, [it.url("/new")])
        assert {received.path: received.id for received in it.received}["/old"] == earlier
    assert outbox.pending_count() == 0


def test_what_is_put_before_the_start_is_delivered_after_it(outbox: Outbox) -> None:
    async def scenario() -> None:
        deliverer = Deliverer(outbox, Settings())
        await deliverer.put([event(it.url())])
        async with delivering(deliverer):
            await came(it, 1)

    with endpoint() as it:
        run(scenario)
    assert outbox.pending_count() == 0


def test_cookies_are_not_kept(outbox: Outbox) -> None:
    with endpoint(lambda received, number: Answer(200, (("Set-Cookie", "a=b"),))) as it:
        deliver(outbox, [it.url(), it.url()])
    assert it.count == 2
    assert all("cookie" not in received.headers for received in it.received)


def test_a_disk_that_refuses_for_a_while_costs_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deliverer_module, "OUTBOX_RETRY_SECONDS", 0.02)
    outbox = Outbox(tmp_path / "later" / "outbox.sqlite3")

    async def scenario() -> None:
        async with delivering(Deliverer(outbox, Settings())) as deliverer:
            while not caplog.records:
                await anyio.lowlevel.checkpoint()
            (tmp_path / "later").mkdir()
            await deliverer.put([event(it.url())])
            await came(it, 1)

    with endpoint() as it:
        run(scenario)
    assert "cannot use the outbox" in caplog.text
    assert outbox.pending_count() == 0
    outbox.close()


def test_logs_hold_no_addresses(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with endpoint(failing(1, Answer(500))) as it:
        deliver(outbox, [it.url("/secret-token")])
    assert "cannot deliver image.stored msg_" in caplog.text
    assert "secret-token" not in caplog.text
    assert "127.0.0.1" not in caplog.text


def test_five_hundred_events_through_an_endpoint_that_fails_half_the_time(outbox: Outbox) -> None:
    def script(received: Received, number: int) -> Answer:
        return Answer(500 if number % 2 else 200)

    with endpoint(script) as it:
        # No stall of a busy machine is to count as an attempt that failed.
        identifiers = deliver(outbox, [it.url()] * 500, attempt_seconds=30)
    attempts = Counter(received.id for received in it.received)
    assert set(attempts) == set(identifiers)
    assert it.count == 1000
    assert (outbox.pending_count(), outbox.dead_count()) == (0, 0)


CHILD = """
import sys, anyio
from pathlib import Path
from supervisor.deliverer import Deliverer
from supervisor.outbox import Event, Outbox
from supervisor.settings import Settings

async def main(path, url, put):
    deliverer = Deliverer(Outbox(Path(path)), Settings())
    if put != "nothing":
        [identifier] = await deliverer.put([Event("image.stored", url, b'{"n": 1}')])
        print(identifier, flush=True)
    if put == "put":
        await anyio.sleep_forever()
    await deliverer.run()

anyio.run(main, *sys.argv[1:])
"""


def child(path: Path, url: str, put: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), url, put],
        cwd=ROOT, env={**os.environ, "NO_PROXY": "*"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_an_event_survives_a_kill_between_commit_and_send(tmp_path: Path) -> None:
    with endpoint() as it:
        first = child(tmp_path / "outbox.sqlite3", it.url(), "put")
        assert first.stdout is not None
        identifier = first.stdout.readline().strip()
        kill(first)
        assert it.count == 0
        second = child(tmp_path / "outbox.sqlite3", it.url(), "nothing")
        it.wait_for_requests(1)
        kill(second)
    assert it.received[0].id == identifier
    assert json.loads(it.received[0].body) == {"n": 1}


def test_an_event_survives_a_kill_before_its_answer(tmp_path: Path) -> None:
    with endpoint(failing(1, Answer(hang=True))) as it:
        first = child(tmp_path / "outbox.sqlite3", it.url(), "put and send")
        it.wait_for_requests(1)
        kill(first)
        second = child(tmp_path / "outbox.sqlite3", it.url(), "nothing")
        it.wait_for_requests(2)
        kill(second)
    assert len({received.id for received in it.received}) == 1
