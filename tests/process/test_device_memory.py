"""A worker's successor starts when the device's memory is back, or has been waited for long enough.

NVML is a fake; the lives are real, of processes that end at once.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from ipc import messages as m
from supervisor import lives, monitoring
from supervisor.fleet import Fleet
from supervisor.lives import Lives
from supervisor.worker import Process, Worker
from supervisor.worker_process import Exit
from tests.tools.fleets import SETTINGS

GB = 2**30
BASELINE = 3 * GB
"""Other tenants hold as much before the first worker starts."""
HELD = 40 * GB


class FakeNvml:
    """One device, whose memory in use is what a list says, reading by reading."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.readings: Iterator[int] = iter(())
        self.used = BASELINE
        self.asked: list[Any] = []

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked.append(name)
        return name

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        self.used = next(self.readings, self.used)
        return SimpleNamespace(used=self.used)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(lives, "POLL_SECONDS", 0.01)
    return fake


class WatchedFleet(Fleet):
    """Tells of the beginning and the end of each of its worker's lives."""

    def __init__(self, spawned: Callable[[int], None]) -> None:
        super().__init__(SETTINGS, ["cuda:0"], draw=lambda: 0.0)
        self.spawned = spawned
        self.count = 0
        self.pid = 0

    def worker_spawned(self, worker: Worker, process: Process, post: Any) -> None:
        super().worker_spawned(worker, process, post)
        self.count += 1
        self.pid = process.pid
        self.spawned(self.count)

    def worker_exited(self, worker: Worker, exit: Exit) -> None:
        assert not os.path.exists(f"/proc/{self.pid}"), "it has not been reaped"
        super().worker_exited(worker, exit)


def begin(worker: Worker) -> m.Start:
    return m.Start(protocol=m.PROTOCOL_VERSION, device="cuda:0")


def live_twice(spawned: Callable[[int], None], environ: dict[str, str] | None = None) -> None:
    """A worker's process ends at once; returns after the second one has begun."""
    second = anyio.Event()

    def on_spawned(count: int) -> None:
        spawned(count)
        if count == 2:
            second.set()
            fleet.stop()

    fleet = WatchedFleet(on_spawned)
    command = (sys.executable, "-c", "raise SystemExit(3)")

    async def run() -> None:
        with anyio.fail_after(10):  # below the real MEMORY_SECONDS
            await Lives(fleet, begin, command, environ or {}).run()

    anyio.run(run)
    assert second.is_set()


def test_a_successor_starts_when_the_memory_is_back(nvml: FakeNvml) -> None:
    used: list[int] = []

    def spawned(count: int) -> None:
        used.append(nvml.used)
        if count == 1:
            nvml.readings = iter([HELD, HELD, HELD // 2, BASELINE + monitoring.HELD_BYTES])

    live_twice(spawned)
    assert used == [BASELINE, BASELINE + monitoring.HELD_BYTES]


def test_memory_that_stays_held_is_not_waited_for_without_end(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lives, "MEMORY_SECONDS", 0.3)
    used: list[int] = []

    def spawned(count: int) -> None:
        used.append(nvml.used)
        nvml.readings = iter([HELD] * 1000)

    with caplog.at_level(logging.WARNING):
        live_twice(spawned)
    assert used == [BASELINE, HELD]
    assert "device memory is still held" in [record.message for record in caplog.records]


def test_a_worker_that_is_stopped_meanwhile_is_not_started(nvml: FakeNvml) -> None:
    fleet = Fleet(SETTINGS, ["cuda:0"])
    begun = Lives(fleet, begin, ("/no/such/program",), {})

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(begun.run)
            while not fleet.workers[0].failed_starts:  # noqa: ASYNC110 - nothing tells of it
                await anyio.sleep(0.01)
            nvml.readings = iter([HELD] * 100_000)
            while nvml.used != HELD:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            fleet.stop()

    with_limit(run)
    assert fleet.workers[0].failed_starts == 1


def with_limit(run: Callable[[], Any]) -> None:
    async def limited() -> None:
        with anyio.fail_after(5):  # far below MEMORY_SECONDS
            await run()

    anyio.run(limited)


@pytest.mark.parametrize(("visible", "device"), [("5", 5), ("GPU-abc", "GPU-abc")])
def test_the_memory_is_that_of_the_device_that_the_worker_sees(
    nvml: FakeNvml, visible: str, device: Any
) -> None:
    live_twice(lambda count: None, {"CUDA_VISIBLE_DEVICES": visible})
    assert set(nvml.asked) == {device}


def test_a_device_that_does_not_tell_is_not_waited_for(nvml: FakeNvml) -> None:
    def refuse(handle: Any) -> Any:
        raise FakeNvml.NVMLError

    nvml.nvmlDeviceGetMemoryInfo = refuse  # type: ignore[method-assign]
    live_twice(lambda count: None)
