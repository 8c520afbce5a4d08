"""Ways to run a module's method faster than it is written, behind one small interface.

A compiler is asked for the best function there is at this moment for a call, and never
lets a call wait: what is not compiled yet runs as it is. Knows targets and tensors,
nothing of jobs.
"""

import logging
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils._pytree import tree_flatten

from gpu_worker.interposer import Target

log = logging.getLogger(__name__)

Function = Callable[..., Any]
Stalls = Callable[[], None]
Backend = Literal["none", "inductor", "stable-fast"]

BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Rows of merged calls: at most a third more work than asked for, nine graphs a shape."""
NOT_DENOISERS = frozenset({"input_ids", "pixel_values"})
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CannotCompile(Exception):
    """The wanted backend is not usable on this worker; says why in a sentence."""


class Compiler(Protocol):
    """`buckets` are the row counts that it wants to see, None for any; `memory_format` is
    how it wants convolutions' weights to lie on the device."""

    @property
    def buckets(self) -> tuple[int, ...] | None: ...
    @property
    def memory_format(self) -> torch.memory_format: ...

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        """What runs such a call best by now; equal functions are the same code."""

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call by it."""

    def give_way(self) -> bool:
        """Frees the device's memory that can be made again; whether there was any."""

    def close(self) -> None:
        """Ends what runs in the background, as soon as that can be."""


def build(
    backend: Backend,
    cuda_graph: bool,
    device: str,
    cache: Path | None,
    stalls: Stalls = lambda: None,
) -> Compiler:
    """The compiler that the settings ask for. Raises CannotCompile.

    `cache` is a folder for compiled code that later processes find again; `stalls` is called
    before calls are held up for seconds, while a module is traced.
    """
    from gpu_worker.compilers.cuda_graph import CudaGraphs
    from gpu_worker.compilers.none import Uncompiled

    compiler: Compiler = Uncompiled()
    if backend == "inductor":
        from gpu_worker.compilers.inductor import Inductor

        compiler = Inductor(cache, torch.device(device))
    elif backend == "stable-fast":
        from gpu_worker.compilers.stable_fast import StableFast

        compiler = StableFast(device, stalls)
    if cuda_graph and device == "cpu":
        log.warning("CUDA_GRAPH has no effect on a CPU")
    graphs = cuda_graph and device != "cpu"
    return CudaGraphs(compiler, torch.device(device)) if graphs else compiler


def worth_compiling(target: Target) -> bool:
    """Denoisers, ControlNets and VAE decoders: batch-first, called often, heavy."""
    if target.layout is None or target.layout.rows in NOT_DENOISERS:
        return False
    return target.method != "encode"


def shape_key(arguments: Any, with_rows: bool) -> Hashable | None:
    """Equal for calls that one piece of code or one graph can run; None for what none can.

    Without rows, one row still differs from several: compilers treat 1 as a constant.
    """
    leaves, spec = tree_flatten(arguments)
    parts: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            rows = leaf.shape[:1] if with_rows else tuple(size == 1 for size in leaf.shape[:1])
            parts.append((rows, leaf.shape[1:], leaf.dtype, leaf.device))
        elif isinstance(leaf, CONSTANTS):
            # The type stands beside the value because True == 1 == 1.0.
            parts.append((type(leaf), leaf))
        else:
            return None
    return (spec, tuple(parts))
