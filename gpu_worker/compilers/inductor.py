"""torch.compile behind the engine's back: one compilation per architecture and picture size.

A child process compiles, for any number of rows, from the architecture and not from the
checkpoint; what it leaves in the cache on disk every slot, worker and later process shares.
Until then calls run uncompiled. Not a thread: while torch traces, it replaces the call of
every module in the process.
"""

import copyreg
import logging
import os
import time
import types
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from torch.utils._pytree import tree_map

from gpu_worker.batching import Arguments, Layout
from gpu_worker.compilers import Function, Stalls, shape_key, worth_compiling
from gpu_worker.interposer import Target
from gpu_worker.slots import lay_out

MAX_ROWS = 32
EXAMPLE_ROWS = 4
CALLS_BEFORE = 4
"""A size that is asked for less often is not worth a minute of compilation."""
MAX_COMPILED = 24
MAX_COMPILE_THREADS = 8
SPARE_BYTES = 4 * 2**30
"""What the child needs on a GPU beside a second copy of the module."""

log = logging.getLogger(__name__)

Code = Callable[[torch.nn.Module, Arguments], Any]


def memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name.removeprefix("torch."))
    return found


# Keys of inductor's cache are hashes of pickles, and the pickle of a memory format names the
# module that Python finds it in first, which is another one in each kind of process: what the
# child compiled was not found by its parent (seen with torch 2.11 and 2.13).
copyreg.pickle(torch.memory_format, lambda each: (memory_format, (str(each),)))


@dataclass(frozen=True)
class Like:
    """A tensor's looks."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Order:
    """What is to be compiled, as it travels to the child: tensors are given by their looks."""

    kind: type[Any]
    config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format
    method: str
    layout: Layout
    arguments: Arguments
    threads: int
    """Of the processor: code for it is of another kind for each number."""


@dataclass(frozen=True)
class Compiled:
    """The code on one target. Equal for the same code and target."""

    target: Target
    code: Code

    def __call__(self, **kwargs: Any) -> Any:
        module = self.target.module
        dtype = next(module.parameters()).dtype
        method = self.target.method
        return self.code(module, tree_map(lambda leaf: _prepared(leaf, method, dtype), kwargs))


class Inductor:
    """All methods are called on the engine's thread."""

    buckets: tuple[int, ...] | None = tuple(range(1, MAX_ROWS + 1))

    def __init__(
        self, cache: Path | None, device: torch.device, stalls: Stalls = lambda: None
    ) -> None:
        self._stalls = stalls
        _keep_processes_few()
        # With the rows dynamic, inductor leaves convolutions in the layout of their weights
        # (torch 2.11: GraphLowering.decide_layout_opt), and a GPU's tensor cores want this one:
        # seen 6.2 ms for two rows of an SD1.5 UNet on an H200, against 9.4 ms.
        last = device.type == "cuda"
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        if cache is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        # A child for each compilation: what it held on the device is then free for sure.
        context = get_context("spawn")
        self._child = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)
        self._calls: dict[Hashable, int] = {}
        self._cached: dict[Hashable, Future[float]] = {}
        self._codes: dict[Hashable, Code | None] = {}
        self._architectures: weakref.WeakKeyDictionary[Any, Hashable] = weakref.WeakKeyDictionary()

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        key = None if args or not worth_compiling(target) else self._key(target, kwargs)
        if key is None:
            return target.run
        cached = self._cached.get(key)
        if cached is None:
            self._consider(key, target, kwargs)
        elif cached.done() and key not in self._codes:
            self._stalls()
            self._codes[key] = _loaded(cached, self._order(target, kwargs), target.module)
        code = self._codes.get(key)
        return target.run if code is None else Compiled(target, code)

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(target, args, kwargs)(*args, **kwargs)

    @property
    def is_compiling(self) -> bool:
        return not all(cached.done() for cached in self._cached.values())

    def wait(self) -> None:
        """Until all that was begun is in the cache. Raises what went wrong."""
        for cached in list(self._cached.values()):
            cached.result()

    def give_way(self) -> bool:
        """Compiled code lies in the host's memory."""
        return False

    def close(self) -> None:
        self._child.shutdown(wait=False, cancel_futures=True)

    def _key(self, target: Target, kwargs: Arguments) -> Hashable:
        """One for each architecture, method and shape, whichever module and however many rows."""
        shape = shape_key(kwargs, with_rows=False)
        if shape is None or target.module.training or not hasattr(target.module, "from_config"):
            return None
        if target.module not in self._architectures:
            self._architectures[target.module] = _architecture(target.module)
        return (self._architectures[target.module], target.method, shape)

    def _consider(self, key: Hashable, target: Target, kwargs: dict[str, Any]) -> None:
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls < CALLS_BEFORE or len(self._cached) >= MAX_COMPILED or not _fits(target.module):
            return
        log.info("compiling %s.%s", target.architecture, target.method)
        order = self._order(target, tree_map(_looks, kwargs))
        self._cached[key] = self._child.submit(_fill_cache, order, os.getpid())

    def _order(self, target: Target, arguments: Arguments) -> Order:
        module: Any = target.module
        first, layout = next(module.parameters()), target.layout
        assert layout is not None, "a target without a layout is not worth compiling"
        return Order(
            kind=type(module),
            config=dict(module.config),
            dtype=first.dtype,
            device=first.device,
            memory_format=self.memory_format,
            method=target.method,
            layout=layout,
            arguments=arguments,
            threads=torch.get_num_threads(),
        )


def _keep_processes_few() -> None:
    """Threads of compilation are processes, and every worker of the host may start them."""
    torch._inductor.config.compile_threads = min(os.cpu_count() or 1, MAX_COMPILE_THREADS)


def _architecture(module: Any) -> Hashable:
    """Equal for modules that the same code can run."""
    config = dict(module.config)
    told = sorted((name, str(value)) for name, value in config.items() if name[:1] != "_")
    return (type(module).__name__, tuple(told), next(module.parameters()).dtype)


def _fits(module: torch.nn.Module) -> bool:
    """Whether the device has room for the child."""
    first = next(module.parameters())
    if not first.is_cuda:
        return True
    size = sum(parameter.nbytes for parameter in module.parameters())
    free, _ = torch.cuda.mem_get_info(first.device)
    return free > size + SPARE_BYTES


def _looks(leaf: Any) -> Any:
    return Like(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _fill_cache(order: Order, parent: int) -> float:
    """In the child: compiles the order for a module of no weights. Returns its seconds."""
    from gpu_worker.__main__ import die_with_parent

    die_with_parent(parent)
    _keep_processes_few()
    torch.set_num_threads(order.threads)
    began = time.monotonic()
    with accelerate.init_empty_weights(include_buffers=False):
        module = order.kind.from_config(order.config)
    module = module.to(order.dtype).to_empty(device=order.device).eval()
    lay_out(module, order.memory_format)
    example = tree_map(lambda leaf: _drawn(leaf, order.device), order.arguments)
    _compile(Order(**vars(order) | {"arguments": example}), module)
    return time.monotonic() - began


def _drawn(leaf: Any, device: torch.device) -> Any:
    is_like = isinstance(leaf, Like)
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) if is_like else leaf


def _loaded(cached: "Future[float]", order: Order, module: torch.nn.Module) -> Code | None:
    """Code from the cache; None where there was none to be had. Takes seconds."""
    name = f"{order.kind.__name__}.{order.method}"
    try:
        compiled_seconds = cached.result()
        began = time.monotonic()
        code = _compile(order, module)
    except Exception as error:
        log.warning("cannot compile %s: %s", name, error)
        return None
    seconds = time.monotonic() - began
    log.info("compiled %s in %.1f s, loaded in %.1f s", name, compiled_seconds, seconds)
    return code


def _compile(order: Order, module: torch.nn.Module) -> Code:
    """Code that is never compiled again: what it does not fit runs uncompiled."""
    method = getattr(order.kind, order.method)
    # Dynamo keeps its code by function: one of its own for each architecture and size.
    own = types.FunctionType(_call.__code__.replace(), globals())
    with torch.no_grad():
        torch.compile(own)(method, module, _example(order))
    ready = torch._dynamo.run(own)
    return lambda module, arguments: ready(method, module, arguments)


def _call(method: Function, module: torch.nn.Module, arguments: Arguments) -> Any:
    return method(module, **arguments)


def _example(order: Order) -> Arguments:
    """Arguments of a few rows where there were several, the rows marked as dynamic."""
    rows = order.arguments[order.layout.rows].shape[0]
    wanted = 1 if rows == 1 else EXAMPLE_ROWS

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        example = _prepared(torch.cat([leaf[:1]] * wanted), order.method, order.dtype)
        if wanted > 1:
            # Without a largest number: the code's own guards allow 63 rows of an SD UNet, and
            # naming more than they allow is an error. Past them calls run uncompiled.
            torch._dynamo.mark_dynamic(example, 0)
        return example

    return {
        name: value if name in order.layout.rowless else tree_map(resized, value)
        for name, value in order.arguments.items()
    }


def _prepared(leaf: Any, method: str, dtype: torch.dtype) -> Any:
    """Decoders are given latents in their own type, as those that upcast expect it."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if method == "decode" and leaf.is_floating_point():
        leaf = leaf.to(dtype)
    return leaf.contiguous()
