"""Makes the code of an order, in a process of its own.

torch.export traces a method with its weights among the arguments, so that the code holds none of
them; inductor compiles what was traced. That takes minutes.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from torch._inductor.standalone_compile import CompiledArtifact
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map, treespec_dumps

from gpu_worker.batching import Arguments, Layout
from gpu_worker.compilers.standalone import (
    CODE,
    EXAMPLE_ROWS,
    MAX_ROWS,
    RESULTS,
    Like,
    Order,
)

MAX_COMPILE_THREADS = 8
MAX_ELEMENTS = 2**31 - 1
"""Of a tensor: kernels may count them in 32 bits."""


def compile_into(folder: Path, order: Order, parent: int) -> float:
    """In a child process of `parent`: leaves the code there, whole or not at all.

    Returns the seconds it took. Weights are only looked at, and take no memory. Nobody else may
    make the same meanwhile.
    """
    from gpu_worker.__main__ import die_with_parent

    die_with_parent(parent)
    began = time.monotonic()
    # Threads of compilation are processes, and every worker of the host may start them.
    torch._inductor.config.compile_threads = min(os.cpu_count() or 1, MAX_COMPILE_THREADS)
    torch.set_num_threads(order.threads)
    with torch.no_grad():
        program = _exported(order)
        most = min(_max_rows(order.layout), MAX_ELEMENTS // _elements_of_a_row(program))
        if most < EXAMPLE_ROWS:
            raise ValueError("its tensors are too large")
        code = _compiled(program.graph_module)
    made = folder.with_suffix(".tmp")
    shutil.rmtree(made, ignore_errors=True)  # of one that was killed
    made.mkdir()
    code.save(path=str(made / CODE))
    spec = treespec_dumps(program.call_spec.out_spec)
    (made / RESULTS).write_text(json.dumps({"spec": spec, "max_rows": most}))
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


def _max_rows(layout: Layout) -> int:
    return layout.max_rows or MAX_ROWS


def _made(leaf: Any, order: Order) -> Any:
    return leaf.empty(order.device) if isinstance(leaf, Like) else leaf


def _dynamic(order: Order) -> dict[str, Any]:
    """For each argument, which of its dimensions counts the rows."""
    rows = torch.export.Dim("rows", min=2, max=_max_rows(order.layout))
    is_lone = order.arguments[order.layout.rows].shape[0] == 1

    def dimensions(leaf: Any) -> Any:
        return {0: rows} if isinstance(leaf, Like) and leaf.shape else None

    def none(leaf: Any) -> None:
        return None

    return {
        name: tree_map(none if is_lone or name in order.layout.rowless else dimensions, value)
        for name, value in order.arguments.items()
    }
