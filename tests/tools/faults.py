"""Jobs that go wrong on scripted workers, and what is then seen of the server."""

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.tools.server import RunningServer, wait_until


def body(prompt: str = "a cat", steps: int = 3, **changes: Any) -> dict[str, Any]:
    parameters = {"prompt": prompt, "num_inference_steps": steps, "seed": 7}
    return {"checkpoint": "cat", "parameters": parameters, "output_format": "png"} | changes


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
