"""Watches a server from a process of its own, so that a busy client delays no probe.

    python -m scripts.host_probe URL FILE      until it is ended

Every line of FILE is a sample: what /health took, or which worker held what and how much of
each NVIDIA device's memory was in use. Times are seconds of the monotonic clock.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

import anyio
import httpx

ROOT = Path(__file__).resolve().parents[1]
HEALTH_EVERY_SECONDS = 0.02
PLACEMENT_EVERY_SECONDS = 0.05


@dataclass(frozen=True)
class Sample:
    """`workers` as in /placement; `used_bytes` by the device's index, empty without NVML."""

    at: float
    health_seconds: float | None = None
    workers: list[dict[str, Any]] = field(default_factory=list)
    used_bytes: list[int] = field(default_factory=list)

    def holds(self, worker: int, checkpoint: str) -> bool:
        """Whether a worker has a checkpoint on its device."""
        models = self.worker(worker)["models"]
        return any(m["checkpoint"] == checkpoint and m["tier"] == "device" for m in models)

    def worker(self, id: int) -> dict[str, Any]:
        return next(worker for worker in self.workers if worker["id"] == id)


class Watch:
    """A probe that runs beside us."""

    def __init__(self, url: str, file: Path) -> None:
        file.write_text("")
        self._file = file.open()
        self._samples: list[Sample] = []
        self._rest = ""
        command = [sys.executable, "-m", "scripts.host_probe", url, str(file)]
        self._process = subprocess.Popen(command, cwd=ROOT)

    def samples(self) -> list[Sample]:
        """All that it has written so far."""
        whole, _, self._rest = (self._rest + self._file.read()).rpartition("\n")
        self._samples += [Sample(**json.loads(line)) for line in whole.splitlines()]
        return self._samples

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._file.close()


@contextlib.contextmanager
def watching(url: str, file: Path) -> Iterator[Watch]:
    watch = Watch(url, file)
    try:
        yield watch
    finally:
        watch.end()


def used_bytes() -> list[int]:
    """Memory in use on each NVIDIA device; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        devices = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices]
    except pynvml.NVMLError:
        return []


class Probe:
    def __init__(self, client: httpx.AsyncClient, output: TextIO) -> None:
        self._client = client
        self._output = output

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._place)
            while True:  # on time, whether the last one was answered or not
                group.start_soon(self._health)
                await anyio.sleep(HEALTH_EVERY_SECONDS)

    async def _health(self) -> None:
        began = monotonic()
        (await self._client.get("/health")).raise_for_status()
        self._write(at=began, health_seconds=monotonic() - began)

    async def _place(self) -> None:
        while True:
            workers = (await self._client.get("/placement")).json()["workers"]
            self._write(at=monotonic(), workers=workers, used_bytes=used_bytes())
            await anyio.sleep(PLACEMENT_EVERY_SECONDS)

    def _write(self, **sample: Any) -> None:
        self._output.write(json.dumps(sample) + "\n")
        self._output.flush()


async def main(url: str, output: TextIO) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        await Probe(client, output).run()


if __name__ == "__main__":
    with open(sys.argv[2], "a") as output:
        anyio.run(main, sys.argv[1], output)
