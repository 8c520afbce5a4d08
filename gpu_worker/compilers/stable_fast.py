"""stable-fast 1.0.5, built by scripts/build_stable_fast: traced and fused code per module.

It traces on the engine's thread at the second call of a shape, which takes seconds. Graphs
are left to CudaGraphs: its own are cached without limit.
"""

import importlib.util
import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.compilers import CannotCompile, Function, Stalls, shape_key, worth_compiling
from gpu_worker.interposer import Target

MAX_TRACED = 24

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """Traced code on one target. Equal for the same code."""

    target: Target
    code: Function

    def __call__(self, **kwargs: Any) -> Any:
        return self.code(**kwargs)


class StableFast:
    """Denoisers and ControlNets only: its gain in a decoder does not pay for the trace."""

    buckets: tuple[int, ...] | None = tuple(range(1, 33))
    memory_format = torch.channels_last

    def __init__(self, device: str, stalls: Stalls = lambda: None) -> None:
        """Raises CannotCompile where the package is missing."""
        if device == "cpu" or importlib.util.find_spec("sfast") is None:
            reason = "it needs a GPU" if device == "cpu" else "the package is not installed"
            raise CannotCompile(
                f"cannot use COMPILE_BACKEND=stable-fast: {reason} "
                "(scripts/build_stable_fast builds it)"
            )
        self._stalls = stalls
        self._seen: set[Hashable] = set()
        self._traced: dict[Hashable, Traced] = {}

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        key = self._key(target, args, kwargs)
        if key is None:
            return target.run
        if key in self._traced:
            return self._traced[key]
        if key not in self._seen or len(self._traced) >= MAX_TRACED:
            self._seen.add(key)
            return target.run
        self._stalls()
        self._traced[key] = Traced(target, _traced(target))
        return self._traced[key]

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(target, args, kwargs)(*args, **kwargs)

    def give_way(self) -> bool:
        return False

    def close(self) -> None:
        self._traced.clear()

    def _key(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        if args or target.method != "forward" or not worth_compiling(target):
            return None
        dtype = next(target.module.parameters()).dtype
        shape = shape_key(kwargs, with_rows=False)
        usable = shape is not None and dtype in (torch.float16, torch.bfloat16)
        return (id(target), shape) if usable else None


def _traced(target: Target) -> Function:
    from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, _build_lazy_trace

    began = time.monotonic()
    config = CompilationConfig.Default()
    config.enable_triton = True
    # Half-precision sums are faster still, and visible.
    config.prefer_lowp_gemm = False
    module = target.module
    trace = _build_lazy_trace(config, enable_triton_reshape=True, enable_triton_layer_norm=True)
    # The module's own forward: bound to it, so that its weights stay parameters of the trace.
    code: Function = trace(type(module).forward.__get__(module))
    log.info("tracing %s took %.1f s", target.architecture, time.monotonic() - began)
    return code
