"""What a user sees with two real workers: models settle, kills are outlived, nothing is left."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tools.server import RunningServer, running, wait_until


@pytest.fixture(scope="module")
def two(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    data_dir = tmp_path_factory.mktemp("two")
    with running(data_dir, workers=2, DEVICES="cpu,cpu", MODEL_DIR=str(model_dir)) as server:
        yield server


def body(checkpoint: str, steps: int = 2, **parameters: Any) -> dict[str, Any]:
    given = {"prompt": "a cat", "num_inference_steps": steps, "seed": 1, **parameters}
    return {"checkpoint": checkpoint, "parameters": given, "output_format": "png"}


def test_two_checkpoints_asked_in_turn_settle_on_a_worker_each(two: RunningServer) -> None:
    homes: dict[str, set[int]] = {"sd15": set(), "sdxl": set()}
    for _ in range(4):
        for checkpoint, seen in homes.items():
            answer = two.generate(body(checkpoint)).raise_for_status().json()
            seen.add(answer["meta"]["worker"])
    assert sorted(map(len, homes.values())) == [1, 1]
    assert homes["sd15"] != homes["sdxl"]


def test_a_worker_killed_in_a_job_costs_no_picture(two: RunningServer) -> None:
    wanted = two.generate(body("sd15", steps=40)).raise_for_status().json()
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(two.generate(body("sd15", steps=40))))
    asking.start()
    wait_until(lambda: any(worker["running"] for worker in two.placement()))
    victim = next(worker for worker in two.placement() if worker["running"])
    os.kill(victim["pid"], signal.SIGKILL)
    asking.join()
    answer = answers[0].raise_for_status().json()
    assert answer["meta"]["attempts"] == 2
    assert answer["images"] == wanted["images"]
    two.until_ready(2)
    assert two.placement()[victim["id"]]["last_exit"] == "was ended by SIGKILL"


def test_a_killed_supervisor_leaves_no_process(model_dir: Path, tmp_path: Path) -> None:
    with running(tmp_path, workers=2, DEVICES="cpu,cpu", MODEL_DIR=str(model_dir)) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        asking = threading.Thread(target=ask_and_lose, args=(server,))
        asking.start()
        wait_until(lambda: any(worker["running"] for worker in server.placement()))
        server.process.kill()
        asking.join()
        assert len(children) >= 2
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


def ask_and_lose(server: RunningServer) -> None:
    with pytest.raises(httpx.TransportError):
        server.generate(body("sd15", steps=1000))
