"""torch.compile behind the engine's back: one compilation per architecture and picture size.

Calls run uncompiled until the code is ready: it is made on a thread of its own, for any
number of rows, from the architecture and not from the checkpoint, so every slot and every
later process (through the cache on disk) shares it.
"""

import logging
import os
import sys
import time
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from gpu_worker.batching import Arguments, Layout
from gpu_worker.compilers import Function, shape_key, worth_compiling
from gpu_worker.interposer import Target

MAX_ROWS = 32
EXAMPLE_ROWS = 4
CALLS_BEFORE = 4
"""A size that is asked for less often is not worth a minute of compilation."""
MAX_COMPILED = 24
SWITCH_SECONDS = 0.0005
"""How long the compiling thread keeps the interpreter from the engine's."""

log = logging.getLogger(__name__)

Code = Callable[[torch.nn.Module, Arguments], Any]


@dataclass(frozen=True)
class Compiled:
    """The code on one target. Equal for the same code and target."""

    target: Target
    code: Code

    def __call__(self, **kwargs: Any) -> Any:
        module = self.target.module
        return self.code(module, tree_map(lambda leaf: _as_compiled(leaf, self.target), kwargs))


class Inductor:
    """All methods but the compilation itself are called on the engine's thread."""

    buckets: tuple[int, ...] | None = tuple(range(1, MAX_ROWS + 1))

    def __init__(self, cache: Path | None) -> None:
        if cache is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        self._thread = ThreadPoolExecutor(1, "compile")
        self._calls: dict[Hashable, int] = {}
        self._made: dict[Hashable, Future[Code]] = {}
        self._architectures: weakref.WeakKeyDictionary[Any, Hashable] = weakref.WeakKeyDictionary()

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        key = None if args or not worth_compiling(target) else self._key(target, kwargs)
        if key is None:
            return target.run
        made = self._made.get(key)
        if made is None:
            self._consider(key, target, kwargs)
        elif made.done() and not made.cancelled() and made.exception() is None:
            return Compiled(target, made.result())
        return target.run

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(target, args, kwargs)(*args, **kwargs)

    def wait(self) -> None:
        """Until all that was begun is compiled. Raises what went wrong."""
        for made in list(self._made.values()):
            made.result()

    def give_way(self) -> bool:
        """Compiled code lies in the host's memory."""
        return False

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _key(self, target: Target, kwargs: Arguments) -> Hashable:
        """One for each architecture, method and shape, whichever module and however many rows."""
        shape = shape_key(kwargs, with_rows=False)
        if shape is None or target.module.training:
            return None
        if target.module not in self._architectures:
            self._architectures[target.module] = _architecture(target)
        return (self._architectures[target.module], target.method, shape)

    def _consider(self, key: Hashable, target: Target, kwargs: dict[str, Any]) -> None:
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls < CALLS_BEFORE or len(self._made) >= MAX_COMPILED or target.layout is None:
            return
        example = _example(kwargs, target, target.layout)
        self._made[key] = self._thread.submit(_compile, target, example, len(self._made))


def _architecture(target: Target) -> Hashable:
    """Equal for modules that the same code can run."""
    config = dict(getattr(target.module, "config", {}))
    told = sorted((name, str(value)) for name, value in config.items() if name[:1] != "_")
    return (target.architecture, tuple(told), next(target.module.parameters()).dtype)


def _example(kwargs: Arguments, target: Target, layout: Layout) -> Arguments:
    """Arguments like these, of a few rows where there were several, the rows marked as dynamic."""
    rows = kwargs[layout.rows].shape[0]
    wanted = 1 if rows == 1 else EXAMPLE_ROWS

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        example = _as_compiled(torch.cat([leaf[:1]] * wanted), target)
        if wanted > 1:
            # Without a largest number: the code's own guards allow 63 rows of an SD UNet, and
            # naming more than they allow is an error. Past them calls run uncompiled.
            torch._dynamo.mark_dynamic(example, 0)
        return example

    return {
        name: value if name in layout.rowless else tree_map(resized, value)
        for name, value in kwargs.items()
    }


def _as_compiled(leaf: Any, target: Target) -> Any:
    """Decoders are given latents in their own type, as those that upcast expect it."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if target.method == "decode" and leaf.is_floating_point():
        leaf = leaf.to(next(target.module.parameters()).dtype)
    return leaf.contiguous()


def _call(method: Function, module: torch.nn.Module, arguments: Arguments) -> Any:
    return method(module, **arguments)


def _compile(target: Target, example: Arguments, number: int) -> Code:
    """Code that is never compiled again: what it does not fit runs uncompiled."""
    began = time.monotonic()
    method = getattr(type(target.module), target.method)
    # Dynamo keeps its code by function: one of its own for each architecture and size.
    own = types.FunctionType(_call.__code__.replace(co_name=f"call_{number}"), globals())
    compiled = torch.compile(own)
    log.info("compiling %s.%s", target.architecture, target.method)
    try:
        with torch.no_grad(), _polite():
            compiled(method, target.module, example)
    except Exception:
        log.exception("cannot compile %s.%s", target.architecture, target.method)
        raise
    seconds = time.monotonic() - began
    log.info("compiled %s.%s in %.1f s", target.architecture, target.method, seconds)
    ready = torch._dynamo.run(own)
    return lambda module, arguments: ready(method, module, arguments)


@contextmanager
def _polite() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
