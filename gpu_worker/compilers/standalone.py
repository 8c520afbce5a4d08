"""A module's method as code in a folder, which any module of its architecture runs in any process.

torch.export traces the method with its weights among the arguments, so that the code holds none
of them; inductor compiles what was traced. That takes minutes. Whoever loads the code traces
nothing and needs seconds at most.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import accelerate  # type: ignore[import-untyped]
import diffusers
import torch
from torch._inductor.standalone_compile import CompiledArtifact
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import (
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from gpu_worker.batching import Arguments, Layout

MAX_ROWS = 32
EXAMPLE_ROWS = 4
"""What kernels are tuned for. One row is a case of its own: compilers take 1 for a constant."""
MAX_COMPILE_THREADS = 8
MAX_ELEMENTS = 2**31 - 1
"""Of a tensor: kernels may count them in 32 bits."""
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


def max_rows(layout: Layout) -> int:
    return layout.max_rows or MAX_ROWS


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


def compile_into(folder: Path, order: Order, parent: int) -> float:
    """In a child process of `parent`: leaves the code there, whole or not at all.

    Returns the seconds it took. Weights are only looked at, and take no memory.
    """
    from gpu_worker.__main__ import die_with_parent

    die_with_parent(parent)
    began = time.monotonic()
    # Threads of compilation are processes, and every worker of the host may start them.
    torch._inductor.config.compile_threads = min(os.cpu_count() or 1, MAX_COMPILE_THREADS)
    torch.set_num_threads(order.threads)
    with torch.no_grad():
        program = _exported(order)
        most = min(max_rows(order.layout), MAX_ELEMENTS // _elements_of_a_row(program))
        if most < EXAMPLE_ROWS:
            raise ValueError("its tensors are too large")
        code = _compiled(program.graph_module)
    # Renamed when all is there, then not found to be removed.
    with tempfile.TemporaryDirectory(
        suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as made:
        code.save(path=f"{made}/{CODE}")
        spec = treespec_dumps(program.call_spec.out_spec)
        (Path(made) / RESULTS).write_text(json.dumps({"spec": spec, "max_rows": most}))
        os.rename(made, folder)
    return time.monotonic() - began


class _Method(torch.nn.Module):
    """A module's method as what functional_call calls."""

    def __init__(self, module: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self._method = method

    def forward(self, **arguments: Any) -> Any:
        return getattr(self.module, self._method)(**arguments)


class _Function(torch.nn.Module):
    """The same as a function of its weights, hidden so that export finds no others."""

    def __init__(self, method: _Method) -> None:
        super().__init__()
        self._hidden = (method,)

    def forward(self, weights: Mapping[str, torch.Tensor], arguments: Arguments) -> Any:
        return torch.func.functional_call(self._hidden[0], dict(weights), (), arguments)


def _exported(order: Order) -> torch.export.ExportedProgram:
    with accelerate.init_empty_weights(include_buffers=False):
        module = order.kind.from_config(order.config).eval()
    with FakeTensorMode(shape_env=ShapeEnv()):
        weights = {f"module.{name}": _made(look, order) for name, look in order.weights.items()}
        arguments = tree_map(lambda leaf: _made(leaf, order), order.arguments)
    # While it exports, torch has no cuDNN. Inductor must not go by what was found out then:
    # convolutions' results would be laid out otherwise, and turned around at a sixth of the time.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        return torch.export.export(
            _Function(_Method(module, order.method)),
            (weights, arguments),
            dynamic_shapes=(dict.fromkeys(weights), _dynamic(order)),
            strict=False,
        )


def _elements_of_a_row(program: torch.export.ExportedProgram) -> int:
    """Of the largest tensor on the way. Rows are the only unknown of a size; where all are known,
    those of the whole."""
    largest = 1
    for node in program.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, torch.Tensor):
                sizes = [size if isinstance(size, int) else size.node.expr for size in value.shape]
                whole = math.prod(sizes)
                known = (
                    whole
                    if isinstance(whole, int)
                    else whole.subs(dict.fromkeys(whole.free_symbols, 1))
                )
                largest = max(largest, int(known))
    return largest


def _compiled(graph: torch.fx.GraphModule) -> CompiledArtifact:
    inputs: list[Any] = []
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op == "placeholder" and not isinstance(value, torch.Tensor):
            graph.graph.erase_node(node)  # a constant, which is part of the code
        elif node.op == "placeholder":
            inputs.append(value)
        # Where inductor looks for what is known of sizes: else rows are those of the example
        # (seen with torch 2.11).
        node.meta["example_value"] = value
    graph.recompile()
    return torch._inductor.standalone_compile(
        graph, inputs, dynamic_shapes="from_graph", options={}, aot=True
    )


def _looks(tensor: torch.Tensor) -> Like:
    return Like(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _made(leaf: Any, order: Order) -> Any:
    return leaf.empty(order.device) if isinstance(leaf, Like) else leaf


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


def _dynamic(order: Order) -> dict[str, Any]:
    """For each argument, which of its dimensions counts the rows."""
    rows = torch.export.Dim("rows", min=2, max=max_rows(order.layout))
    is_lone = order.arguments[order.layout.rows].shape[0] == 1

    def dimensions(leaf: Any) -> Any:
        return {0: rows} if isinstance(leaf, Like) and leaf.shape else None

    def none(leaf: Any) -> None:
        return None

    return {
        name: tree_map(none if is_lone or name in order.layout.rowless else dimensions, value)
        for name, value in order.arguments.items()
    }
