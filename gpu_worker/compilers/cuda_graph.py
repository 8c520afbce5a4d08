"""CUDA graphs of denoisers, ControlNets and encoders of texts or pictures, one per module, shape
and number of rows, over any compiler.

A graph reads its weights where they lie, so it stays valid while checkpoints and LoRAs
are exchanged in place. All graphs share one pool of memory: they run one at a time, and
their outputs are copied out at once.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gpu_worker.compilers import BUCKETS, Compiler, Function, shape_key
from gpu_worker.failures import is_device_failure
from gpu_worker.interposer import Target

MAX_GRAPHS = 64
MAX_POOL_PART = 0.15
"""Of the device's memory; beyond it all graphs are dropped and captured anew when needed."""
MAX_SEEN = 1024

log = logging.getLogger(__name__)


class Graph:
    """One captured call: its inputs are copied in, its outputs copied out.

    The function has run such a call before, so that libraries are loaded and kernels chosen.
    """

    def __init__(self, function: Function, kwargs: dict[str, Any], pool: Any) -> None:
        leaves, spec = tree_flatten(kwargs)
        self._inputs = [_kept(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inputs = iter(self._inputs)
        kept = [next(inputs) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads use the device meanwhile: only this one's calls count.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function(**tree_unflatten(kept, spec))

    def replay(self, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, torch.Tensor)]
        torch._foreach_copy_(self._inputs, tensors)
        self._graph.replay()
        return tree_map(_cloned, self._output)


class Entry:
    """A kind of call that was seen: by which function it ran, and its graph once it ran twice.

    The target is held so that no other takes its place under the same key.
    """

    def __init__(self, target: Target, function: Function) -> None:
        self.target = target
        self.function = function
        self.graph: Graph | None = None
        self.refused = False
        self._module = weakref.ref(target.module)

    @property
    def is_gone(self) -> bool:
        return self._module() is None


class CudaGraphs:
    """Runs a call plainly the first time, captures it the second, replays it from then on."""

    buckets: tuple[int, ...] | None = BUCKETS

    def __init__(self, inner: Compiler, device: torch.device) -> None:
        self._inner = inner
        self._device = device
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        total = torch.cuda.get_device_properties(device).total_memory
        self._max_pool_bytes = int(total * MAX_POOL_PART)
        self._pool: Any = None
        self.pool_bytes = 0

    @property
    def memory_format(self) -> torch.memory_format:
        return self._inner.memory_format

    @property
    def graphs(self) -> int:
        return sum(entry.graph is not None for entry in self._entries.values())

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        return self._inner.function(target, args, kwargs)

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self.function(target, args, kwargs)
        key = self._key(target, args, kwargs)
        if key is None:
            return function(*args, **kwargs)
        entry = self._entries.get(key)
        if entry is None or entry.function != function:
            # Its first run is its warm-up; so is the first by newly compiled code.
            self._remember(key, Entry(target, function))
            return function(*args, **kwargs)
        self._entries.move_to_end(key)
        if entry.graph is None and not entry.refused:
            self._capture(entry, kwargs)
        return function(**kwargs) if entry.graph is None else entry.graph.replay(kwargs)

    def give_way(self) -> bool:
        had = self.graphs > 0
        # All is forgotten, so that what runs next runs without a graph.
        self._entries.clear()
        self._drop_graphs()
        return self._inner.give_way() or had

    def close(self) -> None:
        self._inner.close()

    def _key(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """None for what is not captured: decoders would gain nothing and fill the pool."""
        if args or target.method != "forward" or target.layout is None:
            return None
        leaves = tree_leaves(kwargs)
        if any(leaf.device != self._device for leaf in leaves if isinstance(leaf, torch.Tensor)):
            return None
        shape = shape_key(kwargs, with_rows=True)
        return None if shape is None else (id(target), shape)

    def _remember(self, key: Hashable, entry: Entry) -> None:
        for gone in [key for key, each in self._entries.items() if each.is_gone]:
            del self._entries[gone]
        self._entries[key] = entry
        self._entries.move_to_end(key)
        captured = [key for key, each in self._entries.items() if each.graph is not None]
        for oldest in captured[: max(0, len(captured) - MAX_GRAPHS + 1)]:
            del self._entries[oldest]
        while len(self._entries) > MAX_SEEN:
            self._entries.popitem(last=False)

    def _capture(self, entry: Entry, kwargs: dict[str, Any]) -> None:
        if self.pool_bytes > self._max_pool_bytes:
            self._drop_graphs()
        # The allocator forgets a pool with its last graph: capturing into it again fails (seen
        # when compiled code took the only graph's place). So may one in which a capture failed.
        self.pool_bytes = self.pool_bytes if self.graphs else 0
        if self._pool is None or not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # a capture does so itself, after the memory is counted
        before = torch.cuda.memory_reserved(self._device)
        try:
            entry.graph = Graph(entry.function, kwargs, self._pool)
        except Exception as error:
            if is_device_failure(error) and "captur" not in str(error).lower():
                raise
            # Work that cannot be captured, or no memory for it: it runs without.
            log.warning("cannot capture a graph of %s: %s", entry.target.architecture, error)
            entry.refused, self._pool = True, None
        self.pool_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)

    def _drop_graphs(self) -> None:
        """What was seen stays known, so graphs come back as they are needed."""
        for entry in self._entries.values():
            entry.graph, entry.refused = None, False
        self.pool_bytes = 0
        torch.cuda.empty_cache()


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A place for inputs like this one, contiguous whatever its strides."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
