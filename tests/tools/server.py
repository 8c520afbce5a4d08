"""A real server as a child process, for tests that speak HTTP to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
SERVE = (sys.executable, "-m", "supervisor.cli", "serve")
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_server.py")))
START_SECONDS = 120.0
POLL_SECONDS = 0.02


class RunningServer:
    """A server that was started; its log is a file of JSON lines."""

    def __init__(
        self, process: subprocess.Popen[bytes], url: str, log: Path, key: str = ""
    ) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.client = httpx.Client(base_url=url, timeout=120, headers=bearer(key))

    def placement(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.client.get("/placement").json()["workers"]
        return workers

    def until_ready(self, workers: int = 1) -> None:
        wait_until(lambda: self.ready_count() >= workers, START_SECONDS)

    def ready_count(self) -> int:
        return sum(worker["state"] == "ready" for worker in self.placement())

    def generate(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.client.post("/generate", json=body, **options)

    def processor_seconds(self) -> float:
        """Of the supervisor's threads, those that have ended included; to the microsecond."""
        # The clock of another process, as clock_getcpuclockid(3) makes it of its id: psutil's times
        # are counted in steps of 10 ms.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def wait_until(holds: Any, seconds: float = 30.0) -> None:
    """Polls a condition that no event announces to this process."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(POLL_SECONDS)


@contextmanager
def running(
    data_dir: Path,
    command: Sequence[str] = SERVE,
    workers: int = 1,
    **environ: str,
) -> Iterator[RunningServer]:
    """A server on a free port of the loopback, ended with everything it started."""
    log = data_dir / "log"
    settings = {"DATA_DIR": str(data_dir), "HOST": "127.0.0.1", "PORT": "0", "DEVICES": "cpu"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=output, env={**os.environ, **settings, **environ}
        )
        server = None
        try:
            key = environ.get("API_KEY", "").partition(",")[0]
            server = RunningServer(process, _url(process, log), log, key)
            server.until_ready(workers)
            yield server
        finally:
            _end(process)
            if server is not None:
                server.client.close()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """From the server's first log line that names its addresses."""
    marker = '"addresses":["'
    wait_until(lambda: process.poll() is not None or marker in log.read_text(), START_SECONDS)
    assert process.poll() is None, log.read_text()
    return log.read_text().partition(marker)[2].partition('"')[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
