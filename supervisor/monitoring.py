"""The host in figures: processors, memory, storage, GPUs, versions of packages.

Nothing heavy is imported for it: versions come from the packages' metadata, GPUs from
NVML. What cannot be read is left out or null; monitoring never fails a caller.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil

GB = 2**30
MB = 2**20
PACKAGES = ("torch", "xformers", "triton", "diffusers", "transformers")


class Quota(Protocol):
    """DATA_DIR's limit and what it holds, in bytes; a limit of 0 is none."""

    @property
    def limit_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...


def system_stats(data_dir: Path, quota: Quota | None = None) -> dict[str, Any]:
    """`system_stats` of the webhooks and of GET /stats. Sizes in GB, loads in percent."""
    return {
        "cpu": cpu(),
        "memory": memory(),
        "storage": storage(data_dir, quota),
        "gpu": gpus(),
        "packages": packages(),
    }


def cpu() -> dict[str, Any]:
    """Percent in use since the call before, and MHz, a figure per processor."""
    frequencies: list[Any] = []
    with contextlib.suppress(OSError, NotImplementedError, AttributeError, RuntimeError):
        frequencies = psutil.cpu_freq(percpu=True) or []
    return {
        "utilization": psutil.cpu_percent(percpu=True),
        "frequency": [{"current": f.current, "min": f.min, "max": f.max} for f in frequencies],
    }


def memory() -> dict[str, float]:
    status = psutil.virtual_memory()
    return {
        "total": status.total / GB,
        "available": status.available / GB,
        "percent": status.percent,
        "used": status.used / GB,
        "free": status.free / GB,
    }


def storage(data_dir: Path, quota: Quota | None = None) -> dict[str, float | None]:
    """Of DATA_DIR where it has a limit, else of its file system; free is what an ordinary user
    may take."""
    try:
        status = shutil.disk_usage(data_dir)
    except OSError:
        return {"used": None, "free": None}
    used, free = status.used, status.free
    if quota is not None and quota.limit_bytes:
        used, free = quota.used_bytes, min(free, max(quota.limit_bytes - quota.used_bytes, 0))
    return {"used": used / GB, "free": free / GB}


def gpu_count(visible: str | None = None) -> int:
    """How many NVIDIA devices a worker can see; 0 without a driver.

    `visible` is the variable CUDA_VISIBLE_DEVICES.
    """
    count = 0
    with _nvml() as nvml:
        count = int(nvml.nvmlDeviceGetCount()) if nvml else 0
    return shown(count, visible)


def shown(count: int, visible: str | None) -> int:
    """Of `count` devices those that CUDA_VISIBLE_DEVICES leaves: its list, up to a -1."""
    if visible is None:
        return count
    words = [word.strip() for word in visible.split(",")]
    return min(count, len(list(itertools.takewhile(lambda word: word not in ("", "-1"), words))))


def gpus() -> list[dict[str, Any]]:
    """Each NVIDIA device: load in percent, memory in GB, temperature in °C; empty without one."""
    found: list[dict[str, Any]] = []
    with _nvml() as nvml:
        for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
            found.append(gpu(nvml, index))
    return found


def gpu(nvml: Any, index: int) -> dict[str, Any]:
    """One device's figures, asked of an NVML module; None for what it does not tell."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def asked(name: str, *arguments: Any) -> Any:
        # A MIG slice has no load, for one.
        with contextlib.suppress(nvml.NVMLError):
            return getattr(nvml, name)(handle, *arguments)
        return None

    name, held = asked("nvmlDeviceGetName"), asked("nvmlDeviceGetMemoryInfo")
    load = asked("nvmlDeviceGetUtilizationRates")
    return {
        "id": index,
        "name": name.decode() if isinstance(name, bytes) else name,
        "load": load.gpu if load else None,
        "free_memory": held.free / GB if held else None,
        "used_memory": held.used / GB if held else None,
        "total_memory": held.total / GB if held else None,
        "temperature": asked("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
    }


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML module, or None without a driver. An error of NVML's ends the block, no more."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        with contextlib.suppress(pynvml.NVMLError):
            yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


@functools.cache
def packages() -> dict[str, str | None]:
    """Versions of what is installed, without importing it; null for what is not."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "torch": versions.pop("torch"),
        "cuda": _cuda_version(),
        **versions,
        "stable_fast": _version("stable-fast"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_version() -> str | None:
    """The CUDA that torch was built for, from the file that its build writes."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", Path(str(file)).read_text(), re.MULTILINE)
        return found[1] if found else None
    return None


HELD_BYTES = 512 * MB
"""More than this above the baseline is a worker's; other tenants come and go below it."""


def used_device_bytes(visible: str) -> int | None:
    """Memory in use on a device, named as in CUDA_VISIBLE_DEVICES; None if it is not told."""
    with _nvml() as nvml:
        if nvml is not None:
            by_index = nvml.nvmlDeviceGetHandleByIndex
            handle = (
                by_index(int(visible))
                if visible.isdecimal()
                else nvml.nvmlDeviceGetHandleByUUID(visible)
            )
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    return None


def is_still_held(used: int | None, baseline: int | None) -> bool:
    """True while a device's memory has not come back. Of unknown figures nothing is held."""
    return used is not None and baseline is not None and used > baseline + HELD_BYTES
