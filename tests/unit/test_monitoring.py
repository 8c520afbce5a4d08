"""The figures of the host, in the shape that webhooks and GET /stats promise."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from supervisor import monitoring
from supervisor.quota import Quota
from supervisor.settings import GB


class Frequency(msgspec.Struct, forbid_unknown_fields=True):
    current: float
    min: float
    max: float


class Cpu(msgspec.Struct, forbid_unknown_fields=True):
    utilization: list[float]
    frequency: list[Frequency]


class Memory(msgspec.Struct, forbid_unknown_fields=True):
    total: float
    available: float
    percent: float
    used: float
    free: float


class Storage(msgspec.Struct, forbid_unknown_fields=True):
    used: float
    free: float


class Gpu(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    name: str | None
    load: float | None
    free_memory: float | None
    used_memory: float | None
    total_memory: float | None
    temperature: float | None


class Packages(msgspec.Struct, forbid_unknown_fields=True):
    torch: str | None
    cuda: str | None
    xformers: str | None
    triton: str | None
    diffusers: str | None
    transformers: str | None
    stable_fast: str | None


class SystemStats(msgspec.Struct, forbid_unknown_fields=True):
    cpu: Cpu
    memory: Memory
    storage: Storage
    gpu: list[Gpu]
    packages: Packages


def test_the_figures_have_the_promised_shape(tmp_path: Path) -> None:
    text = msgspec.json.encode(monitoring.system_stats(tmp_path))
    stats = msgspec.json.decode(text, type=SystemStats)
    assert stats.cpu.utilization
    assert 0 < stats.memory.available <= stats.memory.total < 100_000
    assert stats.storage.free > 0
    assert stats.packages.torch


def test_a_data_folder_that_is_gone_does_not_fail_the_caller(tmp_path: Path) -> None:
    assert monitoring.storage(tmp_path / "gone") == {"used": None, "free": None}


def test_with_a_quota_the_storage_is_that_of_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2**20))
    quota = Quota(tmp_path, 3 * 2**20)
    quota.walk()
    assert monitoring.storage(tmp_path, quota) == {"used": 2**20 / GB, "free": 2 * 2**20 / GB}
    quota.limit_bytes = 2**19
    assert monitoring.storage(tmp_path, quota)["free"] == 0
    quota.limit_bytes = 0
    assert monitoring.storage(tmp_path, quota) == pytest.approx(monitoring.storage(tmp_path), 0.01)


class FakeNvml:
    """Two devices, as the NVML module tells of them; the second one's load is not known."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=4 * 2**30, used=2**30, free=3 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 40


def test_a_device_tells_its_memory_in_gigabytes_and_null_for_what_it_does_not_know() -> None:
    first, second = (monitoring.gpu(FakeNvml(), index) for index in (0, 1))
    assert msgspec.convert(first, Gpu) == Gpu(0, "NVIDIA H200", 50, 3, 1, 4, 40)
    assert math.isclose(first["free_memory"], 3)
    assert second["load"] is None
    assert second["total_memory"] == 4


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("1", 1), ("0,2,-1,3", 2), ("0,1,2,3,4", 4)],
)
def test_hidden_devices_do_not_count(visible: str | None, count: int) -> None:
    assert monitoring.shown(4, visible) == count
