"""Workers that do every wrong thing, under a real supervisor: who is answered, who lives on.

The workers are scripted (tests/tools/scripted_worker.py); what they do wrong is in the prompt.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tools import weights
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

STEP_TIMEOUT_SECONDS = 1.5
PROBE_SECONDS = 0.1
KEYS = ("key-one", "key-two")


def body(prompt: str = "a cat", steps: int = 3, **changes: Any) -> dict[str, Any]:
    parameters = {"prompt": prompt, "num_inference_steps": steps, "seed": 7}
    return {"checkpoint": "cat", "parameters": parameters, "output_format": "png"} | changes


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("cat", "dog"):
        weights.files(folder / "checkpoints" / name, weights.checkpoint_files("sd15"))
    return folder


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[RunningServer]:
    """Four workers that do one job at a time; many deaths are spread over them."""
    settings = {"MODEL_DIR": str(models), "DEVICES": "cpu,cpu,cpu,cpu", "MAX_QUEUE": "100",
                "STEP_TIMEOUT_SECONDS": f"{STEP_TIMEOUT_SECONDS}",
                "LOAD_TIMEOUT_SECONDS": "2"}  # fmt: skip
    folder = tmp_path_factory.mktemp("four")
    with running(folder, SCRIPTED, workers=4, **settings) as server:
        yield server


@pytest.fixture
def server(four: RunningServer) -> RunningServer:
    four.until_ready(4)
    loaded = four.client.post("/load/checkpoint", json={"checkpoint": "cat", "worker": "all"})
    assert loaded.json() == ["cat"]
    return four


@pytest.fixture(scope="session")
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


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool


def once(tmp_path: Path, fault: str) -> str:
    """A prompt whose fault is due the first time only."""
    return f"fault:{fault} count_file={tmp_path / 'count'} times=1"


def code(response: httpx.Response) -> str:
    return str(response.json().get("code"))


def exits(server: RunningServer) -> list[str]:
    return [worker["last_exit"] for worker in server.placement() if worker["last_exit"]]


def busy(server: RunningServer) -> list[dict[str, Any]]:
    return [worker for worker in server.placement() if worker["running"]]


def until_running(server: RunningServer, count: int = 1) -> list[dict[str, Any]]:
    wait_until(lambda: sum(worker["running"] for worker in server.placement()) >= count)
    return busy(server)


def until_queued(server: RunningServer, count: int) -> None:
    wait_until(lambda: sum(worker["queued"] for worker in server.placement()) >= count)


def probes(server: RunningServer, work: "Future[Any]") -> list[float]:
    """How long /health took each time while the work went on, in seconds, in order."""
    seconds = []
    while not work.done():
        began = time.monotonic()
        assert server.client.get("/health").status_code == 200
        seconds.append(time.monotonic() - began)
        time.sleep(0.01)
    return sorted(seconds)


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# Deaths.


def test_a_job_is_finished_elsewhere_with_the_same_picture_when_its_worker_is_killed(
    server: RunningServer, callers: ThreadPoolExecutor
) -> None:
    undisturbed = server.generate(body()).json()["images"]
    slow = body("fault:slow step_seconds=0.1", steps=10)
    work = [callers.submit(server.generate, slow) for _ in range(2)]
    victim, bystander = until_running(server, 2)
    os.kill(victim["pid"], signal.SIGKILL)
    answers = [each.result().json() for each in work]
    assert [answer["images"] for answer in answers] == [undisturbed] * 2
    assert sorted(answer["meta"]["attempts"] for answer in answers) == [1, 2]
    server.until_ready(4)
    workers = server.placement()
    assert workers[victim["id"]]["last_exit"] == "was ended by SIGKILL"
    assert workers[victim["id"]]["pid"] != victim["pid"]
    assert workers[bystander["id"]]["pid"] == bystander["pid"]


def test_a_worker_with_a_cuda_error_is_never_used_again(
    server: RunningServer, tmp_path: Path
) -> None:
    before = {worker["pid"] for worker in server.placement()}
    answer = server.generate(body(once(tmp_path, "cuda_error step=2")))
    assert (answer.status_code, answer.json()["meta"]["attempts"]) == (200, 2)
    server.until_ready(4)
    assert len(before - {worker["pid"] for worker in server.placement()}) == 1
    assert "gave up (device): cannot go on: a CUDA error (exited with code 70)" in exits(server)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("exit code=3 step=2", "exited with code 3"),
        ("abort step=2", "was ended by SIGABRT"),
        ("garbage step=2", "broke the protocol: cannot decode a frame of 4 bytes"),
        ("unknown_message step=2", "broke the protocol: cannot understand a message of type"),
        ("oversized_frame step=2", "broke the protocol: cannot carry a frame of 4294967295 bytes"),
        ("half_frame step=2", "exited with code 1"),
        ("half_frame then=silence step=2", f"made no progress for {STEP_TIMEOUT_SECONDS} s"),
        ("hang step=2", f"made no progress for {STEP_TIMEOUT_SECONDS} s while denoising"),
    ],
)
def test_whatever_a_worker_does_its_job_is_finished_elsewhere(
    server: RunningServer, tmp_path: Path, fault: str, words: str
) -> None:
    memory = psutil.Process(server.process.pid).memory_info().rss
    answer = server.generate(body(once(tmp_path, fault)))
    assert (answer.status_code, answer.json()["meta"]["attempts"]) == (200, 2), answer.text
    assert any(words in last_exit for last_exit in exits(server)), exits(server)
    assert psutil.Process(server.process.pid).memory_info().rss - memory < 50 * 2**20


def test_a_stopped_worker_is_replaced_and_probes_do_not_notice(
    server: RunningServer, tmp_path: Path, callers: ThreadPoolExecutor
) -> None:
    work = callers.submit(server.generate, body(once(tmp_path, "stop step=2 step_seconds=0.3")))
    stopped = until_running(server)[0]["pid"]
    seconds = probes(server, work)
    assert work.result().json()["meta"]["attempts"] == 2
    assert not lives(stopped)
    assert seconds[len(seconds) * 95 // 100] < PROBE_SECONDS


def test_every_phase_has_its_deadline(server: RunningServer, callers: ThreadPoolExecutor) -> None:
    """Loading, a step and a decode that never end: each ends two workers and is poison."""
    prompts = {"loading": "fault:slow load_seconds=99", "encoding": "fault:slow step_seconds=99",
               "decoding": "fault:slow encode_seconds=99"}  # fmt: skip
    work = {
        phase: callers.submit(
            server.generate, body(prompt, checkpoint="dog" if phase == "loading" else "cat")
        )
        for phase, prompt in prompts.items()
    }
    for phase, each in work.items():
        answer = each.result()
        assert (answer.status_code, code(answer)) == (500, "poison")
        assert f"while {phase}" in answer.json()["detail"]


def test_poison_is_answered_and_then_refused(server: RunningServer) -> None:
    poison = body("fault:exit code=9 step=1 poison")
    answer = server.generate(poison)
    assert (answer.status_code, code(answer)) == (500, "poison")
    assert "exited with code 9" in answer.json()["detail"]
    restarts = [worker["restarts"] for worker in server.placement()]
    began = time.monotonic()
    again = server.generate(poison | {"parameters": poison["parameters"] | {"seed": 8}})
    assert (again.status_code, code(again)) == (500, "poison")
    assert time.monotonic() - began < 1
    server.until_ready(4)
    assert sum(w["restarts"] for w in server.placement()) <= sum(restarts) + 2
    assert server.generate(body()).status_code == 200


def test_a_request_that_was_lost_with_its_worker_twice_is_answered(
    server: RunningServer, callers: ThreadPoolExecutor
) -> None:
    work = callers.submit(server.generate, body("fault:slow step_seconds=0.5", steps=20))
    first = until_running(server)[0]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: [worker["pid"] for worker in busy(server)] not in ([], [first]))
    os.kill(busy(server)[0]["pid"], signal.SIGKILL)
    assert (work.result().status_code, code(work.result())) == (503, "worker_lost")
    assert work.result().headers["Retry-After"]


def test_what_a_worker_started_ends_with_it(server: RunningServer, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    server.generate(body(f"fault:grandchild pid_file={pid_file}"))
    grandchild = int(pid_file.read_text())
    holder = psutil.Process(grandchild).ppid()
    os.kill(holder, signal.SIGKILL)
    wait_until(lambda: not lives(grandchild), 10)
    assert not any("closed its pipe" in last_exit for last_exit in exits(server))


@pytest.mark.parametrize("fault", ["print bytes=3000000", "flood_stderr bytes=3000000"])
def test_what_a_worker_prints_breaks_nothing(server: RunningServer, fault: str) -> None:
    answer = server.generate(body(f"fault:{fault} step=2"))
    assert (answer.status_code, answer.json()["meta"]["attempts"]) == (200, 1)


def test_out_of_memory_is_answered_and_the_worker_lives_on(server: RunningServer) -> None:
    """The real worker's own memory: tests/process/test_recycling.py."""
    pids = [worker["pid"] for worker in server.placement()]
    supervisor, sizes = psutil.Process(server.process.pid), []
    for _ in range(50):
        answer = server.generate(body("fault:out_of_memory step=2"))
        assert (answer.status_code, code(answer)) == (507, "out_of_memory")
        sizes.append(supervisor.memory_info().rss)
    assert server.generate(body()).status_code == 200
    assert sizes[-1] < sizes[9] + 4 * 2**20
    assert [worker["pid"] for worker in server.placement()] == pids


def test_the_rung_of_the_memory_ladder_is_in_the_answer(server: RunningServer) -> None:
    answer = server.generate(body("fault:out_of_memory step=2 memory_fallback=tiling"))
    assert answer.json()["meta"]["memory_fallback"] == "tiling"


def test_workers_are_replaced_under_load_without_a_failed_request(
    server: RunningServer, callers: ThreadPoolExecutor
) -> None:
    before = {worker["pid"] for worker in server.placement()}
    replaced = False

    def keep_asking() -> list[int]:
        statuses = []
        while not replaced:
            statuses.append(server.generate(body("fault:slow step_seconds=0.02")).status_code)
        return statuses

    load = [callers.submit(keep_asking) for _ in range(6)]
    assert server.client.post("/restart").status_code == 202
    least = 4

    def all_are_new() -> bool:
        nonlocal least
        workers = server.placement()
        states = [worker["state"] for worker in workers]
        least = min(least, states.count("ready"))
        new = not before & {worker["pid"] for worker in workers}
        return new and states == ["ready"] * 4

    wait_until(all_are_new)
    replaced = True
    statuses = [status for each in load for status in each.result()]
    assert set(statuses) == {200}
    assert least == 3


# One worker, a short queue.


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


# Servers of their own.


def test_batch_mates_of_poison_finish(
    tmp_path: Path, models: Path, callers: ThreadPoolExecutor
) -> None:
    settings = {"MODEL_DIR": str(models), "IGI_SCRIPT": "capacity=3", "DEVICES": "cpu,cpu"}
    with running(tmp_path, SCRIPTED, workers=2, **settings) as server:
        server.client.post("/load/checkpoint", json={"checkpoint": "cat", "worker": 0})
        mates = [
            callers.submit(server.generate, body("fault:slow step_seconds=0.1", steps=8))
            for _ in range(2)
        ]
        until_running(server, 2)
        poison = server.generate(body("fault:exit step=3 step_seconds=0.05", steps=8))
        assert (poison.status_code, code(poison)) == (500, "poison")
        assert [mate.result().status_code for mate in mates] == [200, 200]


def test_a_crash_loop_ends_in_quarantine_and_the_rest_serve_on(
    tmp_path: Path, models: Path
) -> None:
    # Of nine deaths before ready one worker has five, the other at most four.
    script = f"die_before_ready code=4 count_file={tmp_path / 'count'} times=9"
    settings = {"MODEL_DIR": str(models), "IGI_SCRIPT": script, "DEVICES": "cpu,cpu"}
    with running(tmp_path, SCRIPTED, workers=1, **settings) as server:

        def states() -> list[str]:
            return sorted(worker["state"] for worker in server.placement())

        wait_until(lambda: states() == ["quarantined", "ready"])
        assert set(exits(server)) == {"exited with code 4"}
        assert server.generate(body()).status_code == 200
        assert server.client.get("/ready").status_code == 200
        assert server.client.post("/restart").status_code == 202
        wait_until(lambda: states() == ["ready", "ready"])


def test_a_worker_that_does_not_get_ready_is_replaced(tmp_path: Path, models: Path) -> None:
    script = f"hang_before_ready count_file={tmp_path / 'count'} times=1"
    settings = {"MODEL_DIR": str(models), "IGI_SCRIPT": script, "START_TIMEOUT_SECONDS": "4"}
    with running(tmp_path, SCRIPTED, **settings) as server:
        assert exits(server) == ["was not ready within 4 s (was ended by SIGKILL)"]
        assert server.generate(body()).status_code == 200


def test_without_any_worker_the_server_says_so(tmp_path: Path, models: Path) -> None:
    settings = {"MODEL_DIR": str(models), "IGI_SCRIPT": "die_before_ready code=4"}
    with running(tmp_path, SCRIPTED, workers=0, **settings) as server:
        assert server.client.get("/ready").status_code == 503
        waiting = server.generate(
            body()
        )  # accepted while there is hope, answered when there is not
        assert (waiting.status_code, code(waiting)) == (503, "unavailable")
        assert [worker["state"] for worker in server.placement()] == ["quarantined"]
        assert code(server.generate(body())) == "unavailable"
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("at", "fault"),
    [
        ("idle", "step=2"),
        ("denoising", "step=1 step_seconds=60"),
        ("loading", "step=0 load_seconds=60"),
    ],
)
def test_nothing_is_left_of_a_killed_supervisor(
    tmp_path: Path, models: Path, callers: ThreadPoolExecutor, at: str, fault: str
) -> None:
    """One of two workers has started a process of its own, and is still at it or idle again."""
    settings = {"MODEL_DIR": str(models), "DEVICES": "cpu,cpu"}
    pid_file = tmp_path / "pid"
    with running(tmp_path, SCRIPTED, workers=2, **settings) as server:
        work = callers.submit(
            server.generate, body(f"fault:grandchild {fault} pid_file={pid_file}")
        )
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
        if at == "idle":
            assert work.result().status_code == 200
        assert len(busy(server)) == (at != "idle")
        family = psutil.Process(server.process.pid).children(recursive=True)
        pids = {process.pid for process in family}
        workers = {worker["pid"] for worker in server.placement()}
        assert {int(pid_file.read_text()), *workers} <= pids
        server.process.kill()
        wait_until(lambda: not any(lives(process.pid) for process in family), 10)


def test_a_server_that_drains_finishes_its_work_and_exits_with_zero(
    tmp_path: Path, models: Path, callers: ThreadPoolExecutor
) -> None:
    settings = {"MODEL_DIR": str(models), "IGI_SCRIPT": "ignore_term"}
    with running(tmp_path, SCRIPTED, **settings) as server, httpx.Client() as idle:
        idle.get(f"{server.url}/health")  # keeps its connection
        slow = body("fault:slow step_seconds=0.1", steps=8)
        first = callers.submit(server.generate, slow)
        until_running(server)
        queued = callers.submit(server.generate, slow)
        stream = callers.submit(server.generate, slow, headers={"Accept": "text/event-stream"})
        until_queued(server, 2)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.client.get("/ready").status_code == 503)
        late = server.generate(body())
        assert (late.status_code, code(late)) == (503, "draining")
        assert int(late.headers["Retry-After"]) >= 1
        assert server.client.get("/health").status_code == 200
        assert [first.result().status_code, queued.result().status_code] == [200, 200]
        assert "event: finished" in stream.result().text
        assert server.process.wait(15) == 0


def test_what_is_not_done_when_the_drain_is_over_is_answered(
    tmp_path: Path, models: Path, callers: ThreadPoolExecutor
) -> None:
    settings = {"MODEL_DIR": str(models), "DRAIN_SECONDS": "0.5"}
    with running(tmp_path, SCRIPTED, **settings) as server:
        endless = body("fault:slow step_seconds=0.1", steps=1000)
        work = [callers.submit(server.generate, endless) for _ in range(2)]
        until_queued(server, 1)
        assert server.stop() == 0
        assert [code(each.result()) for each in work] == ["draining"] * 2


def test_a_second_signal_ends_the_server_at_once(
    tmp_path: Path, models: Path, callers: ThreadPoolExecutor
) -> None:
    with running(tmp_path, SCRIPTED, MODEL_DIR=str(models)) as server:
        callers.submit(server.generate, body("fault:slow step_seconds=0.1", steps=1000))
        until_running(server)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.client.get("/ready").status_code == 503)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
        assert time.monotonic() - began < 3
        wait_until(lambda: not any(lives(process.pid) for process in family), 10)
