"""How many rows one forward may have: a cap, lowered by what the device was seen to need.

A forward that is new to an architecture and shape starts small; its peak of memory
gives the cost of a row, and what is free then says how many rows fit.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Value = TypeVar("Value")

MAX_ROWS = 32
UNMEASURED_ROWS = 2
USABLE_PART = 0.8
"""Of the free memory: an estimate by rows leaves fragmentation out."""
REMEMBERED_SHAPES = 256
MEMORY_AGE_SECONDS = 0.5


class Memory(Protocol):
    """What a device's allocator can tell. Bytes."""

    def free(self) -> int: ...
    def begin_peak(self) -> None: ...
    def peak(self) -> int: ...


class CudaMemory:
    """The caching allocator of one CUDA device; its counters need no synchronisation."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._now = now
        self._read_at = -MEMORY_AGE_SECONDS
        self._free = 0
        self._before = 0

    def free(self) -> int:
        """Free on the device or held unused by the allocator; at most half a second old."""
        if self._now() - self._read_at >= MEMORY_AGE_SECONDS:
            free, _ = torch.cuda.mem_get_info(self._device)
            held = torch.cuda.memory_reserved(self._device)
            self._free = free + held - torch.cuda.memory_allocated(self._device)
            self._read_at = self._now()
        return self._free

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


def memory_of(device: torch.device) -> Memory | None:
    """A CPU's memory is not asked."""
    return CudaMemory(device) if device.type == "cuda" else None


class Limits:
    """Sizes of merged forwards. `buckets` are the row counts that a compiler wants to
    see; None pads nothing. Without `memory` only the caps hold."""

    def __init__(
        self,
        max_rows: int = MAX_ROWS,
        buckets: Sequence[int] | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.buckets = buckets
        self._max_rows = max_rows
        self._memory = memory
        self._measured: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()
        self._refused: OrderedDict[Hashable, int] = OrderedDict()

    def max_rows(self, shape: Hashable, cap: int | None = None) -> int:
        """The most rows that a forward of this architecture and shape may have."""
        rows = min(self._max_rows, cap or self._max_rows, self._refused.get(shape, self._max_rows))
        if self._memory is None:
            return rows
        if shape not in self._measured:
            return min(rows, UNMEASURED_ROWS)
        _, row_bytes = self._measured[shape]
        fitting = int(self._memory.free() * USABLE_PART / max(row_bytes, 1.0))
        return max(1, min(rows, fitting))

    @contextmanager
    def measured(self, shape: Hashable, rows: int) -> Iterator[None]:
        """Around a forward: learns what a row costs, from the largest one so far."""
        known_rows, _ = self._measured.get(shape, (0, 0.0))
        if self._memory is None or rows <= known_rows:
            yield
            return
        self._memory.begin_peak()
        yield
        _remember(self._measured, shape, (rows, self._memory.peak() / rows))

    def refuse(self, shape: Hashable, rows: int) -> None:
        """A forward of that many rows ran out of memory."""
        _remember(self._refused, shape, max(1, rows // 2))

    def forget_refusals(self) -> None:
        """What did not fit beside other work may fit now."""
        self._refused.clear()


def _remember(table: "OrderedDict[Hashable, Value]", key: Hashable, value: Value) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > REMEMBERED_SHAPES:
        table.popitem(last=False)
