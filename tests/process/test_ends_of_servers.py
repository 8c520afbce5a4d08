"""Servers whose workers never get ready, that are killed, and that drain."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.tools.faults import body, busy, code, exits, lives, until_queued, until_running
from tests.tools.server import SCRIPTED, running, wait_until


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
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 3
        wait_until(lambda: not any(lives(process.pid) for process in family), 10)
