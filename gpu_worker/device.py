"""The device that this worker has: its type of weights, its memory, its name."""

import importlib.metadata
import os
import platform

import diffusers
import psutil
import torch
import transformers

from ipc.messages import PROTOCOL_VERSION, Memory, Ready, Start

CPU_SHARE = 0.5
HOST_SHARE = 0.5
COPIES_SHARE = 0.3
"""On a CPU, beside CPU_SHARE of the same memory."""
CUDA_SHARE = 0.85
PACKAGES = {
    "torch": "torch",
    "xformers": "xformers",
    "triton": "triton",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "stable_fast": "stable-fast",
}


def dtype(start: Start) -> torch.dtype:
    """The weights' type: as asked, else float16 on CUDA and float32 on a CPU."""
    if start.dtype != "auto":
        return getattr(torch, start.dtype)  # type: ignore[no-any-return]
    return torch.float32 if start.device == "cpu" else torch.float16


def budget_bytes(start: Start) -> int:
    """Bytes for weights: as asked, else half of a host's memory or 85 % of a GPU's."""
    if start.device_memory_bytes is not None:
        return start.device_memory_bytes
    share = CPU_SHARE if start.device == "cpu" else CUDA_SHARE
    return int(memory(start).total * share)


def host_bytes(start: Start) -> int:
    """Bytes of files to keep mapped and registered, or on a CPU of copies of single files: as
    asked, else a share of the host's memory."""
    if start.host_memory_bytes is not None:
        return start.host_memory_bytes
    share = COPIES_SHARE if start.device == "cpu" else HOST_SHARE
    return int(psutil.virtual_memory().total * share)


def memory(start: Start) -> Memory:
    if start.device == "cpu":
        host = psutil.virtual_memory()
        return Memory(total=host.total, used=host.total - host.available, free=host.available)
    free, total = torch.cuda.mem_get_info(start.device)
    return Memory(total=total, used=total - free, free=free)


def allocated_bytes(start: Start) -> int | None:
    """What this process's tensors take on the device; a CPU's allocator does not tell."""
    return None if start.device == "cpu" else torch.cuda.memory_allocated(start.device)


def free(start: Start) -> None:
    """Gives memory that is cached but unused back to the device."""
    if start.device != "cpu":
        torch.cuda.empty_cache()


def ready(start: Start, capacity: int = 1) -> Ready:
    """What a worker on this device says when it is ready; makes the device's context."""
    return Ready(
        protocol=PROTOCOL_VERSION,
        device_name=name(start.device),
        memory=memory(start),
        packages={key: version(package) for key, package in PACKAGES.items()}
        | {"cuda": torch.version.cuda},
        capacity=capacity,
    )


def quiet_libraries() -> None:
    """Keeps the model libraries' remarks and progress bars out of the log; errors stay."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def use_threads() -> None:
    """As many as the environment says; torch has read it already where this was forked."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > 0:
        torch.set_num_threads(int(threads))


def name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name(device)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
