"""A module's method as code in a folder, which any module of its architecture runs in any process.

It is made to an order (compilation.py), which takes minutes. Whoever loads it traces nothing and
needs seconds at most.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch._inductor.standalone_compile import CompiledArtifact
from torch.utils._pytree import (
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_loads,
)

from gpu_worker.batching import Arguments, Layout

MAX_ROWS = 32
EXAMPLE_ROWS = 4
"""What kernels are tuned for. One row is a case of its own: compilers take 1 for a constant."""
FORMAT = 1
"""To be raised with every change of what is made of an order."""
CODE, RESULTS = "code", "results.json"


@dataclass(frozen=True)
class Like:
    """A tensor's looks."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Order:
    """What is to be compiled, as it travels to another process: tensors are given by their looks.

    The arguments have one row, or EXAMPLE_ROWS that stand for any number of them up to `max_rows`.
    `threads` are the processor's, for which code differs with their number; 1 for a GPU.
    """

    kind: type[Any]
    config: dict[str, Any]
    method: str
    layout: Layout
    weights: dict[str, Like]
    arguments: Arguments
    device: torch.device
    threads: int

    @classmethod
    def of(cls, module: Any, method: str, layout: Layout, arguments: Arguments) -> "Order":
        """For code that runs such calls on modules that look like this one."""
        device = next(module.parameters()).device
        return cls(
            kind=type(module),
            config={name: value for name, value in module.config.items() if name[:1] != "_"},
            method=method,
            layout=layout,
            weights={name: _looks(weight) for name, weight in weights_of(module).items()},
            arguments=_example(_prepared(arguments, module, method, layout), layout),
            device=device,
            threads=torch.get_num_threads() if device.type == "cpu" else 1,
        )

    @property
    def name(self) -> str:
        return f"{self.kind.__name__}.{self.method}"

    @property
    def digest(self) -> str:
        """Names the code that comes of this order here, with these libraries."""
        versions = (FORMAT, torch.__version__, diffusers.__version__, platform.python_version())
        if self.device.type == "cuda":
            place = torch.cuda.get_device_properties(self.device).name
        else:
            place = torch.backends.cpu.get_cpu_capability()
        # In an order of its own: that of a set is another one in each process.
        config = json.dumps(self.config, sort_keys=True, default=str)
        told = vars(self) | {"config": config, "layout": _told(self.layout)}
        return hashlib.sha256(repr((versions, place, told)).encode()).hexdigest()[:32]


def _told(layout: Layout) -> dict[str, Any]:
    told = vars(layout).items()
    return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in told}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _prepared(
    arguments: Arguments, module: torch.nn.Module, method: str, layout: Layout
) -> Arguments:
    """Those that are read, contiguous; decoders are given latents in their own type, as those that
    upcast expect it."""
    dtype = next(module.parameters()).dtype

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if method == "decode" and leaf.is_floating_point():
            leaf = leaf.to(dtype)
        return leaf.contiguous()

    changed: Arguments = tree_map(change, layout.read(arguments))
    return changed


class Code:
    """What `compile_into` left in a folder for an order. Raises whatever is wrong with that.

    It checks sizes and strides of what it is given, and no types. `max_rows` are for its callers.
    """

    def __init__(self, folder: Path, order: Order) -> None:
        self._code = CompiledArtifact.load(path=str(folder / CODE))
        results = json.loads((folder / RESULTS).read_text())
        self._results, self.max_rows = treespec_loads(results["spec"]), results["max_rows"]
        self._order = order
        self._weights: WeakKeyDictionary[torch.nn.Module, list[torch.Tensor] | None]
        self._weights = WeakKeyDictionary()

    def fits(self, module: torch.nn.Module) -> bool:
        """Whether it was made for weights like the module's. Looked at once: there are up to
        1,700, and they stay where they are."""
        if module not in self._weights:
            weights = weights_of(module)
            fits = {name: _looks(weight) for name, weight in weights.items()} == self._order.weights
            self._weights[module] = list(weights.values()) if fits else None
        return self._weights[module] is not None

    def __call__(self, module: torch.nn.Module, arguments: Arguments) -> Any:
        """What the method of a module that it fits returns for these arguments."""
        weights = self._weights[module]
        assert weights is not None
        prepared = _prepared(arguments, module, self._order.method, self._order.layout)
        tensors = [leaf for leaf in tree_leaves(prepared) if isinstance(leaf, torch.Tensor)]
        return tree_unflatten(list(self._code(*weights, *tensors)), self._results)


def _looks(tensor: torch.Tensor) -> Like:
    return Like(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _example(arguments: Arguments, layout: Layout) -> Arguments:
    """The arguments' looks with one row, or with those that stand for several."""
    rows = 1 if arguments[layout.rows].shape[0] == 1 else EXAMPLE_ROWS

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = (rows, *leaf.shape[1:]) if leaf.dim() else ()
        return _looks(torch.empty(shape, dtype=leaf.dtype, device="meta"))

    def alike(leaf: Any) -> Any:
        return _looks(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return {
        name: tree_map(alike if name in layout.rowless else resized, value)
        for name, value in arguments.items()
    }
