"""On a GPU: graphs and compiled code outlive the checkpoint that they were made over."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gpu_worker.adapters import AdapterState
from gpu_worker.compilers.cuda_graph import CudaGraphs
from gpu_worker.compilers.none import Uncompiled
from gpu_worker.host_tier import HostTier, MappedFile
from gpu_worker.interposer import LAYOUTS, Target
from gpu_worker.library import Library
from ipc.messages import Model
from tests.tools import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    root = tmp_path_factory.mktemp("checkpoints")
    for seed in (0, 1):
        tiny.build_checkpoint(root / str(seed), "sd15", seed)
    return [Model(name=str(seed), path=str(root / str(seed))) for seed in (0, 1)]


@pytest.fixture
def library(models: list[Model]) -> Library:
    """With room for one of the two."""
    files = Path(models[0].path).rglob("*.safetensors")
    size = sum(file.stat().st_size for file in files) // 2
    return Library(DEVICE, torch.float16, int(1.5 * size), lambda: None)


def call(rows: int, unet: Any) -> dict[str, Any]:
    half = {"device": DEVICE, "dtype": torch.float16}
    return {
        "sample": torch.randn(rows, 4, 8, 8, **half),
        "timestep": torch.full((rows,), 500.0, device=DEVICE),
        "encoder_hidden_states": torch.randn(rows, 77, unet.config.cross_attention_dim, **half),
        "return_dict": False,
    }


def target(unet: Any) -> Target:
    return Target(unet, "forward", LAYOUTS[("UNet2DConditionModel", "forward")])


def test_a_graph_gives_the_numbers_of_whichever_checkpoint_is_in_its_slot(
    library: Library, models: list[Model]
) -> None:
    graphs = CudaGraphs(Uncompiled(), torch.device(DEVICE))
    unet = library.checkpoint(models[0]).parts["unet"]
    wanted, kwargs = target(unet), call(2, unet)
    graphs.run(wanted, (), kwargs)
    first = graphs.run(wanted, (), kwargs)[0]
    assert library.checkpoint(models[1]).parts["unet"] is unet
    second = graphs.run(wanted, (), kwargs)[0]
    assert graphs.graphs == 1
    torch.testing.assert_close(second, unet(**kwargs)[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(first, second)
    assert library.checkpoint(models[0]).parts["unet"] is unet
    assert torch.equal(graphs.run(wanted, (), kwargs)[0], first)


@pytest.mark.parametrize("hidden_states", [False, True])
def test_a_text_encoders_graph_follows_its_checkpoint_too(
    library: Library, models: list[Model], hidden_states: bool
) -> None:
    graphs = CudaGraphs(Uncompiled(), torch.device(DEVICE))
    encoder = library.checkpoint(models[0]).parts["text_encoder"]
    wanted, kwargs = text_target(encoder), prompt(encoder, hidden_states)
    results = [graphs.run(wanted, (), kwargs) for _ in range(3)]
    assert graphs.graphs == 1
    assert same(results[2], encoder(**kwargs))
    assert library.checkpoint(models[1]).parts["text_encoder"] is encoder
    other = graphs.run(wanted, (), kwargs)
    assert same(other, encoder(**kwargs))
    assert not same(other, results[2])


def test_a_call_that_waits_for_the_device_runs_without_a_graph(
    library: Library, models: list[Model]
) -> None:
    graphs = CudaGraphs(Uncompiled(), torch.device(DEVICE))
    encoder = library.checkpoint(models[0]).parts["text_encoder"]
    wanted, kwargs = text_target(encoder), prompt(encoder)
    first = next(each for each in encoder.modules() if isinstance(each, torch.nn.Embedding))
    waits = first.register_forward_pre_hook(wait_for_device)
    expected = encoder(**kwargs)
    assert all(same(graphs.run(wanted, (), kwargs), expected) for _ in range(3))
    assert graphs.graphs == 0
    waits.remove()
    graphs.give_way()
    assert all(same(graphs.run(wanted, (), kwargs), expected) for _ in range(3))
    assert graphs.graphs == 1


def wait_for_device(*_: Any) -> None:
    torch.ones(1, device=DEVICE).item()


def text_target(encoder: Any) -> Target:
    return Target(encoder, "forward", LAYOUTS[("CLIPTextModel", "forward")])


def prompt(encoder: Any, hidden_states: bool = False) -> dict[str, Any]:
    ids = torch.randint(0, encoder.config.vocab_size, (1, 77), device=DEVICE)
    return {"input_ids": ids} | ({"output_hidden_states": True} if hidden_states else {})


def same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return type(one) is type(other) and all(torch.equal(*pair) for pair in pairs)


class Renewed(Uncompiled):
    """Like a compiler whose code becomes ready in between."""

    def __init__(self) -> None:
        self.code: Any = None

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.code or target.run


def test_the_only_graph_is_captured_anew_by_code_that_takes_its_place(
    library: Library, models: list[Model]
) -> None:
    inner = Renewed()
    graphs = CudaGraphs(inner, torch.device(DEVICE))
    unet = library.checkpoint(models[0]).parts["unet"]
    wanted, kwargs = target(unet), call(2, unet)
    first = [graphs.run(wanted, (), kwargs)[0] for _ in range(3)]
    inner.code = partial(wanted.run)
    second = [graphs.run(wanted, (), kwargs)[0] for _ in range(3)]
    assert graphs.graphs == 1
    assert all(torch.allclose(each, first[0], atol=1e-3) for each in second)


def test_graphs_that_gave_way_come_back(library: Library, models: list[Model]) -> None:
    graphs = CudaGraphs(Uncompiled(), torch.device(DEVICE))
    unet = library.checkpoint(models[0]).parts["unet"]
    wanted, kwargs = target(unet), call(2, unet)
    results = [graphs.run(wanted, (), kwargs)[0] for _ in range(3)]
    assert graphs.give_way()
    assert not graphs.give_way()
    assert graphs.graphs == 0
    results += [graphs.run(wanted, (), kwargs)[0] for _ in range(3)]
    assert graphs.graphs == 1
    assert all(torch.allclose(each, results[0], atol=1e-3) for each in results)


def test_an_output_is_not_overwritten_by_the_next_replay(
    library: Library, models: list[Model]
) -> None:
    graphs = CudaGraphs(Uncompiled(), torch.device(DEVICE))
    unet = library.checkpoint(models[0]).parts["unet"]
    wanted, one, other = target(unet), call(2, unet), call(2, unet)
    graphs.run(wanted, (), one)
    kept = graphs.run(wanted, (), one)[0]
    copy = kept.clone()
    graphs.run(wanted, (), other)
    assert torch.equal(kept, copy)


def test_a_mapped_file_is_registered_and_released(models: list[Model]) -> None:
    (file,) = (Path(models[0].path) / "unet").glob("*.safetensors")
    mapped = MappedFile(file)
    mapped.register()
    assert mapped.registered
    tensor = next(iter(mapped.weights.values()))
    assert torch.equal(tensor.to(DEVICE, non_blocking=True).cpu(), tensor)
    mapped.release()
    assert torch.equal(tensor.to(DEVICE).cpu(), tensor)


def test_what_left_the_device_is_told_to_be_on_the_host(
    library: Library, models: list[Model]
) -> None:
    for model in models:
        library.checkpoint(model)
    told = {each.checkpoint: each.tier for each in library.residents()}
    assert told == {"0": "host", "1": "device"}
    assert library.unload(models[0].path)
    assert [each.checkpoint for each in library.residents()] == ["1"]


def test_swaps_leave_device_memory_flat(library: Library, models: list[Model]) -> None:
    def swap(count: int) -> int:
        for index in range(count):
            state: AdapterState = library.checkpoint(models[index % 2]).adapters
            state.restore()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(DEVICE)

    assert swap(10) == swap(50)


def test_a_file_can_be_registered_where_another_was_dropped(models: list[Model]) -> None:
    (file,) = (Path(models[0].path) / "unet").glob("*.safetensors")
    for _ in range(3):  # mappings of one size are given one address after another's end
        mapped = MappedFile(file)
        mapped.register()
        assert mapped.registered
        del mapped
    torch.zeros(1, device=DEVICE)


def test_the_host_registers_what_it_holds(models: list[Model]) -> None:
    (file,) = (Path(models[0].path) / "unet").glob("*.safetensors")
    host = HostTier(DEVICE, 2**30)
    host.weights([file])
    assert host.holds([file])
    host.clear()
    assert not host.holds([file])
