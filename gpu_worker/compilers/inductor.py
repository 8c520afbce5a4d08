"""torch.compile's inductor behind the engine's back: one compilation for each architecture and
picture size, in a child process and for any number of rows.

What it leaves in a folder on disk every slot, worker and later process shares. Until it is
there and loaded, calls run uncompiled; none waits.
"""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from gpu_worker.batching import Arguments, NotBatchFirst, count_rows
from gpu_worker.compilers import Function, shape_key, worth_compiling
from gpu_worker.compilers.compilation import compile_into
from gpu_worker.compilers.standalone import MAX_ROWS, Code, Order
from gpu_worker.interposer import Target
from gpu_worker.slots import signature

CALLS_BEFORE = 4
"""A size that is asked for less often is not worth minutes of compilation."""
MAX_CODES = 24
SPARE_BYTES = 4 * 2**30
"""What the child needs on a GPU, for a context and for trying kernels out."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """The code on one target. Equal for the same code and target."""

    target: Target
    code: Code

    def __call__(self, **kwargs: Any) -> Any:
        return self.code(self.target.module, kwargs)


class Inductor:
    """All methods are called on the engine's thread."""

    buckets: tuple[int, ...] | None = tuple(range(1, MAX_ROWS + 1))

    def __init__(self, cache: Path | None, device: torch.device) -> None:
        # With the rows dynamic, inductor leaves convolutions in the layout of their weights
        # (torch 2.11: GraphLowering.decide_layout_opt), and a GPU's tensor cores want this one:
        # seen 6.2 ms for two rows of an SD1.5 UNet on an H200, against 9.4 ms.
        last = device.type == "cuda"
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        if cache is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        self._folder = Path(cache_dir())
        # This process compiles nothing, and needs none of the processes that would help it.
        torch._inductor.config.compile_threads = 1
        self._one = threading.Lock()
        self._loaders = ThreadPoolExecutor(MAX_CODES, "code")
        self._calls: dict[Hashable, int] = {}
        self._codes: dict[Hashable, Future[Code]] = {}
        self._architectures: WeakKeyDictionary[Any, Hashable] = WeakKeyDictionary()

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        rows = 0 if args or not worth_compiling(target) else _rows(target, kwargs)
        key = self._key(target, kwargs) if 0 < rows <= MAX_ROWS else None
        if key is None:
            return target.run
        code = self._codes.get(key)
        if code is None:
            self._consider(key, target, kwargs)
            return target.run
        if not code.done() or code.exception() is not None:
            return target.run
        ready = code.result()
        fits = rows <= ready.max_rows and ready.fits(target.module)
        return Compiled(target, ready) if fits else target.run

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(target, args, kwargs)(*args, **kwargs)

    @property
    def is_compiling(self) -> bool:
        return not all(code.done() for code in self._codes.values())

    def wait(self) -> None:
        """Until all that was begun is loaded. Raises what went wrong."""
        for code in list(self._codes.values()):
            code.result()

    def give_way(self) -> bool:
        """Compiled code lies in the host's memory."""
        return False

    def close(self) -> None:
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _key(self, target: Target, kwargs: Arguments) -> Hashable:
        """One for each architecture, method and shape, whichever module and however many rows."""
        assert target.layout is not None
        shape = shape_key(target.layout.read(kwargs), with_rows=False)
        module: Any = target.module
        if shape is None or module.training or not hasattr(module, "from_config"):
            return None
        if getattr(module, "use_tiling", False) or getattr(module, "use_slicing", False):
            return None
        if module not in self._architectures:
            dtype = next(module.parameters()).dtype
            self._architectures[module] = signature(type(module), module.config, dtype)
        return (self._architectures[module], target.method, shape)

    def _consider(self, key: Hashable, target: Target, kwargs: Arguments) -> None:
        """Has code loaded that is there, and made once it is worth that."""
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if len(self._codes) >= MAX_CODES:
            return
        is_due = calls >= CALLS_BEFORE and _has_room(target.module)
        if not (calls == 1 or is_due):
            return
        assert target.layout is not None
        order = Order.of(target.module, target.method, target.layout, kwargs)
        folder = self._folder / f"code-{order.digest}"
        if is_due or folder.exists():
            self._codes[key] = self._loaders.submit(self._obtained, order, folder)

    def _obtained(self, order: Order, folder: Path) -> Code:
        """On a thread of its own: no other worker makes the same meanwhile; several may load it."""
        try:
            with _locked(folder, fcntl.LOCK_SH), suppress(Exception):
                return self._found(order, folder)
            with _locked(folder, fcntl.LOCK_EX):
                return self._found_or_removed(order, folder) or self._made(order, folder)
        except Exception as error:
            log.warning("cannot compile %s: %s", order.name, error)
            raise

    def _found(self, order: Order, folder: Path) -> Code:
        """Raises FileNotFoundError, or whatever is wrong with the code."""
        began = time.monotonic()
        code = Code(folder, order)
        log.info("loaded code of %s in %.1f s", order.name, time.monotonic() - began)
        return code

    def _found_or_removed(self, order: Order, folder: Path) -> Code | None:
        if not folder.exists():
            return None
        try:
            return self._found(order, folder)
        except Exception as error:
            log.warning("cannot load code of %s, which is made anew: %s", order.name, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def _made(self, order: Order, folder: Path) -> Code:
        log.info("compiling %s", order.name)
        # A process for each, one at a time: what it held on the device is then free for sure, and
        # one that is killed takes no other along.
        with self._one, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            seconds = child.submit(compile_into, folder, order, os.getpid()).result()
        began = time.monotonic()
        code = Code(folder, order)
        loading = time.monotonic() - began
        log.info("compiled %s in %.1f s, loaded in %.1f s", order.name, seconds, loading)
        return code


def _rows(target: Target, kwargs: Arguments) -> int:
    """0 for a call whose rows cannot be counted."""
    assert target.layout is not None, "a target without a layout is not worth compiling"
    try:
        return count_rows(kwargs, target.layout)
    except NotBatchFirst:
        return 0


def _has_room(module: torch.nn.Module) -> bool:
    """Whether the device has memory for the child."""
    first = next(module.parameters())
    return not first.is_cuda or torch.cuda.mem_get_info(first.device)[0] > SPARE_BYTES


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Waits while another process has this folder to itself, or, to have it so, while any reads."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, how)
        yield
