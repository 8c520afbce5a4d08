"""Compilers on the CPU: what is compiled computes the same, and nobody waits for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from gpu_worker.batching import Layout
from gpu_worker.compilers import CannotCompile, build, shape_key
from gpu_worker.compilers.inductor import CALLS_BEFORE, Compiled, Inductor
from gpu_worker.compilers.none import Uncompiled
from gpu_worker.interposer import Target

LAYOUT = Layout("sample", scalars=frozenset({"timestep"}))


class Denoiser(nn.Module):
    """Small, with one layer whose width its configuration tells."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.config = {"width": width}
        self.layer = nn.Linear(width, width)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Denoiser":
        return cls(**config)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.sin(self.layer(sample)) * timestep[:, None],)


class Decoder(Denoiser):
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cos(self.layer(z))


def target(module: nn.Module, method: str = "forward", rows: str = "sample") -> Target:
    layout = LAYOUT if rows == "sample" else Layout(rows)
    return Target(module.eval(), method, layout)


def call(rows: int, width: int = 8) -> dict[str, Any]:
    return {"sample": torch.randn(rows, width), "timestep": torch.rand(rows)}


@pytest.fixture(scope="module")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Inductor:
    return Inductor(tmp_path_factory.mktemp("cache"), torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def warmed(inductor: Inductor, wanted: Target, kwargs: dict[str, Any]) -> None:
    for _ in range(CALLS_BEFORE):
        inductor.run(wanted, (), kwargs)
    inductor.wait()


def test_without_a_compiler_a_call_is_the_modules_own() -> None:
    module = Denoiser()
    kwargs = call(2)
    result = Uncompiled().run(target(module), (), kwargs)
    assert torch.equal(result[0], module(**kwargs)[0])


def test_what_the_child_compiled_is_found_and_not_compiled_again(inductor: Inductor) -> None:
    # Keys hold the layouts of weights, which are pickled otherwise in every kind of process.
    module = Denoiser(12)
    wanted, kwargs = target(module), call(2, 12)
    warmed(inductor, wanted, kwargs)
    counters.clear()
    assert isinstance(inductor.function(wanted, (), kwargs), Compiled)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_a_call_that_is_held_up_by_loading_is_announced(tmp_path: Path) -> None:
    held_up: list[str] = []
    inductor = Inductor(tmp_path, torch.device("cpu"), lambda: held_up.append("loading"))
    module = Denoiser()
    wanted, kwargs = target(module), call(2)
    warmed(inductor, wanted, kwargs)
    assert not held_up
    for _ in range(2):
        inductor.run(wanted, (), kwargs)
    assert held_up == ["loading"]
    inductor.close()


def test_calls_run_uncompiled_until_the_code_is_ready(inductor: Inductor) -> None:
    module = Denoiser()
    wanted, kwargs = target(module), call(2)
    for _ in range(CALLS_BEFORE):
        assert inductor.function(wanted, (), kwargs) == wanted.run
    inductor.wait()
    assert isinstance(inductor.function(wanted, (), kwargs), Compiled)
    torch.testing.assert_close(inductor.run(wanted, (), kwargs)[0], module(**kwargs)[0])


def test_one_compilation_serves_all_rows_all_modules_and_new_weights(inductor: Inductor) -> None:
    first, second = Denoiser(), Denoiser()
    warmed(inductor, target(first), call(2))
    inductor.run(target(first), (), call(2))
    compiled = compilations()
    for module in (first, second):
        for rows in (2, 3, 16):
            kwargs = call(rows)
            code = inductor.function(target(module), (), kwargs)
            assert isinstance(code, Compiled)
            torch.testing.assert_close(code(**kwargs)[0], module(**kwargs)[0])
    first.layer.weight.copy_(second.layer.weight)
    first.layer.bias.copy_(second.layer.bias)
    kwargs = call(4)
    one, other = (inductor.run(target(module), (), kwargs)[0] for module in (first, second))
    assert torch.equal(one, other)
    assert compilations() == compiled


def test_other_sizes_and_architectures_are_compiled_apart(inductor: Inductor) -> None:
    narrow, wide = Denoiser(), Denoiser(16)
    warmed(inductor, target(narrow), call(2))
    assert not isinstance(inductor.function(target(wide), (), call(2, 16)), Compiled)
    warmed(inductor, target(wide), call(2, 16))
    kwargs = call(3, 16)
    torch.testing.assert_close(inductor.run(target(wide), (), kwargs)[0], wide(**kwargs)[0])


def test_a_decoder_is_compiled_in_its_own_type(inductor: Inductor) -> None:
    module = Decoder()
    latents = torch.randn(1, 8, dtype=torch.float16)
    module.decode = lambda z: Decoder.decode(module, z.float())  # type: ignore[method-assign]
    decode = target(module, "decode", "z")
    warmed(inductor, decode, {"z": latents})
    code = inductor.function(decode, (), {"z": latents})
    assert isinstance(code, Compiled)
    torch.testing.assert_close(code(z=latents), module.decode(latents))


def test_text_encoders_and_unknown_arguments_are_left_alone(inductor: Inductor) -> None:
    module = Denoiser()
    reader = Target(module, "forward", Layout("input_ids"))
    unknown = Target(module, "forward", None)
    for each in (reader, unknown):
        for _ in range(CALLS_BEFORE + 1):
            assert inductor.function(each, (), call(2)) == each.run
    assert shape_key({"sample": object()}, with_rows=True) is None


class Stubborn(Denoiser):
    """No process but the first one can build it."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Denoiser":
        raise RuntimeError("cannot be built")


def test_code_that_cannot_be_compiled_runs_as_it_is(inductor: Inductor) -> None:
    module = Stubborn()
    kwargs = call(2)
    with pytest.raises(RuntimeError, match="cannot be built"):
        warmed(inductor, target(module), kwargs)
    assert torch.equal(inductor.run(target(module), (), kwargs)[0], module(**kwargs)[0])


def test_what_cannot_be_built_elsewhere_is_left_alone(inductor: Inductor) -> None:
    class Unknown(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            return (sample,)

    module = Unknown()
    unknown = target(module)
    assert inductor.function(unknown, (), call(2)) == unknown.run


def test_stable_fast_says_what_is_missing() -> None:
    with pytest.raises(CannotCompile, match="cannot use COMPILE_BACKEND=stable-fast"):
        build("stable-fast", False, "cpu", None)


def test_graphs_are_no_matter_for_a_cpu(tmp_path: Path) -> None:
    assert isinstance(build("none", True, "cpu", tmp_path), Uncompiled)


def compilations() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
