"""Workers that do every wrong thing, under a real supervisor: who is answered, who lives on.

The workers are scripted (tests/tools/scripted_worker.py); what they do wrong is in the prompt.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.tools.faults import body, busy, code, exits, lives, once, probes, until_running
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

STEP_TIMEOUT_SECONDS = 1.5
PROBE_SECONDS = 0.1


@pytest.fixture(scope="module")
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
