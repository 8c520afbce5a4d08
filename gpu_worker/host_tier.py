"""Weights in the host's memory: safetensors files mapped read-only, and registered with the driver.

Every worker of the host shares the pages of one file. From registered memory a copy to
the device runs at the bus's full speed (seen on an H200: 55 GB/s, against 7.8 GB/s from
pageable memory). On a CPU a folder's mapping is used as it is (single files: host_copies.py).
"""

import json
import logging
import mmap
import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_worker.host_copies import Weights

MAX_HEADER_BYTES = 100 * 2**20
REGISTER_READ_ONLY = 0x08
"""cudaHostRegisterReadOnly: without it a read-only mapping is refused."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

log = logging.getLogger(__name__)


class CannotMap(Exception):
    """A file that is not plain, whole safetensors."""


class MappedFile:
    """One file's tensors, read-only: writing to one ends the process.

    The mapping lives as long as any of its tensors. MAP_SHARED and a disk's file: a
    private mapping was seen to hang the driver.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._whole = torch.frombuffer(mapping, dtype=torch.uint8)
        self.weights = _tensors(self._whole)
        self.bytes = self._whole.numel()
        self._unregister: weakref.finalize[..., MappedFile] | None = None

    def register(self) -> None:
        """Pins the pages for the driver; where it refuses, the file stays usable, slower."""
        pages = -(-self.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        code = int(_runtime().cudaHostRegister(self._whole.data_ptr(), pages, REGISTER_READ_ONLY))
        if code:
            log.warning("cannot register a file of %d bytes: error %d", self.bytes, code)
            _clear_last_error()
            return
        # The driver remembers addresses: a mapping that ended without this would be taken for
        # the next one in its place, which fails somewhere else (seen on an H200).
        pointer = self._whole.data_ptr()
        self._unregister = weakref.finalize(self, _runtime().cudaHostUnregister, pointer)
        self._unregister.atexit = False

    @property
    def registered(self) -> bool:
        return self._unregister is not None and self._unregister.alive

    def release(self) -> None:
        """Takes the registration back. No copy from it may be under way."""
        if self._unregister is not None:
            self._unregister()


class HostTier:
    """The files that were used last, within `max_bytes`, registered where there is a GPU."""

    def __init__(self, device: str, max_bytes: int) -> None:
        self._registers = torch.device(device).type == "cuda"
        self.max_bytes = max_bytes
        self._held: OrderedDict[tuple[int, ...], MappedFile] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self._held.values())

    def weights(self, files: Sequence[Path]) -> Weights:
        """All tensors of some files by name. Raises CannotMap, OSError."""
        found: Weights = {}
        for path in files:
            found |= self._file(path).weights
        return found

    def holds(self, files: Sequence[Path]) -> bool:
        """Whether all of these files are mapped, and as they are now."""
        return bool(files) and all(identity(path) in self._held for path in files)

    def clear(self) -> None:
        self._make_room(self.max_bytes)

    def _file(self, path: Path) -> MappedFile:
        key = identity(path)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        file = MappedFile(path)
        self._make_room(file.bytes)
        if file.bytes <= self.max_bytes:
            self._held[key] = file
            if self._registers:
                file.register()
        return file

    def _make_room(self, size: int) -> None:
        while self._held and self.bytes + size > self.max_bytes:
            _, oldest = self._held.popitem(last=False)
            oldest.release()


def identity(path: Path) -> tuple[int, ...]:
    """Another one when the file is replaced or changed."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _tensors(whole: torch.Tensor) -> Weights:
    """Views of a file's bytes by its header. Raises CannotMap."""
    length = int.from_bytes(bytes(whole[:8].tolist()), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, whole.numel() - 8):
        raise CannotMap("its header does not fit into it")
    try:
        header = json.loads(whole[8 : 8 + length].numpy().tobytes())
        header.pop("__metadata__", None)
        return {name: _tensor(whole, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        raise CannotMap("its header is broken") from None


def _tensor(whole: torch.Tensor, start: int, entry: dict[str, Any]) -> torch.Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    if not 0 <= begin <= end <= whole.numel() - start:
        raise ValueError("outside of the file")
    if end - begin != shape.numel() * dtype.itemsize:
        raise ValueError("another size than its shape says")
    part = whole[start + begin : start + end]
    if part.data_ptr() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _clear_last_error() -> None:
    """The runtime reports a refused registration once more, at the next launch."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        torch.zeros(1, device="cuda")
