"""One worker and a short queue: who waits, who is refused, when the device is free again."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.tools.faults import body, busy, code, once, probes, until_queued, until_running
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

PROBE_SECONDS = 0.1
KEYS = ("key-one", "key-two")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[RunningServer]:
    """One worker that does one job at a time, a short queue, and keys."""
    settings = {"MODEL_DIR": str(models), "MAX_QUEUE": "4", "API_KEY": ",".join(KEYS)}
    folder = tmp_path_factory.mktemp("one")
    with running(folder, SCRIPTED, workers=0, **settings) as server:
        server.client.headers["Authorization"] = f"Bearer {KEYS[0]}"
        yield server


@pytest.fixture
def single(one: RunningServer) -> RunningServer:
    one.until_ready(1)
    return one


def test_bystanders_move_and_spend_no_attempt(
    single: RunningServer, tmp_path: Path, callers: ThreadPoolExecutor
) -> None:
    prompt = once(tmp_path, "exit code=5 step=5 step_seconds=0.1")
    bad = callers.submit(single.generate, body(prompt, steps=5))
    until_running(single)
    others = [callers.submit(single.generate, body(f"bystander {n}")) for n in range(3)]
    assert [each.result().json()["meta"]["attempts"] for each in others] == [1, 1, 1]
    assert bad.result().json()["meta"]["attempts"] == 2


def test_ten_times_the_load_is_refused_politely(
    single: RunningServer, callers: ThreadPoolExecutor
) -> None:
    slow = body("fault:slow step_seconds=0.1")
    work = [callers.submit(single.generate, slow) for _ in range(49)]
    seconds = probes(single, callers.submit(lambda: [each.result() for each in work]))
    answers = [each.result() for each in work]
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) - len(refused) >= 5
    assert {code(answer) for answer in refused} == {"queue_full"}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert seconds[len(seconds) * 95 // 100] < PROBE_SECONDS


def test_a_job_that_cannot_meet_its_deadline_is_refused(
    single: RunningServer, callers: ThreadPoolExecutor
) -> None:
    slow = body("fault:slow step_seconds=0.2", steps=10)
    assert single.generate(body("fault:slow step_seconds=0.2", steps=2)).status_code == 200
    work = callers.submit(single.generate, slow)
    until_running(single)
    late = single.generate(body("fault:slow step_seconds=0.2", steps=5, timeout_seconds=1))
    assert (late.status_code, code(late)) == (429, "too_late")
    assert int(late.headers["Retry-After"]) >= 1
    assert work.result().status_code == 200


def test_the_device_is_free_a_step_after_the_caller_has_left(single: RunningServer) -> None:
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=single.url, headers=single.client.headers, timeout=0.5) as caller,
    ):
        caller.post("/generate", json=body("fault:slow step_seconds=0.1", steps=900))
    left = time.monotonic()
    wait_until(lambda: not busy(single))
    assert time.monotonic() - left < 1


def test_the_device_is_free_a_step_after_the_deadline(single: RunningServer) -> None:
    slow = body("fault:slow step_seconds=0.1", steps=1000, timeout_seconds=400)
    began = time.monotonic()
    headers = {"Prefer": "respond-async"}
    slow["parameters"]["width"] = 72  # steps of other sizes do not show that it cannot be done
    job = single.generate(slow | {"timeout_seconds": 0.5, "checkpoint": "dog"}, headers=headers)
    poll = job.json()["poll_url"]
    wait_until(lambda: single.client.get(poll).json()["status"] == "expired")
    assert single.client.get(poll).json()["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: not busy(single))
    assert time.monotonic() - began < 2.5


def test_callers_take_turns_and_each_ones_priorities_count(
    single: RunningServer, callers: ThreadPoolExecutor
) -> None:
    order: list[str] = []

    def ask(name: str, key: str, priority: int = 0) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        prompt = f"fault:slow step_seconds=0.05 {name}=1"
        answer = single.generate(body(prompt, priority=priority), headers=headers)
        assert answer.status_code == 200
        order.append(name)

    endless = body("fault:slow step_seconds=0.05", steps=900)
    ahead = single.generate(endless, headers={"Prefer": "respond-async"}).json()["poll_url"]
    until_running(single)
    work = []
    for count, (name, key, priority) in enumerate(
        [("flood", KEYS[0], 0), ("low", KEYS[0], -5), ("high", KEYS[0], 5), ("late", KEYS[1], 0)]
    ):
        work.append(callers.submit(ask, name, key, priority))
        until_queued(single, count + 1)
    single.client.delete(ahead)
    for each in work:
        each.result()
    assert order == ["high", "late", "flood", "low"]
