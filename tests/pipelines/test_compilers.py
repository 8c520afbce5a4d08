"""Compilers on the CPU: what is compiled computes the same, and nobody waits for it."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpu_worker.batching import Layout
from gpu_worker.compilers import CannotCompile, build, shape_key
from gpu_worker.compilers.inductor import CALLS_BEFORE, Compiled, Inductor
from gpu_worker.compilers.none import Uncompiled
from gpu_worker.compilers.standalone import MAX_ROWS, Order
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


class SamplingDecoder(Decoder):
    def decode(self, z: torch.Tensor, generator: object = None) -> torch.Tensor:
        return torch.tanh(self.layer(z))


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


def test_a_later_process_loads_what_it_finds_at_the_first_call(tmp_path: Path) -> None:
    module, kwargs = Denoiser(12), call(2, 12)
    wanted, earlier = target(module), Inductor(tmp_path, torch.device("cpu"))
    warmed(earlier, wanted, kwargs)
    earlier.close()
    later = Inductor(tmp_path, torch.device("cpu"))
    assert later.function(wanted, (), kwargs) == wanted.run
    later.wait()
    assert isinstance(later.function(wanted, (), kwargs), Compiled)
    torch.testing.assert_close(later.run(wanted, (), kwargs)[0], module(**kwargs)[0])
    later.close()


DIGEST = """
import torch
from gpu_worker.compilers.standalone import Order
from gpu_worker.interposer import POSITIONED
from tests.pipelines.test_compilers import Denoiser
print(Order.of(Denoiser(), "forward", POSITIONED, {"hidden_states": torch.zeros(2, 8)}).digest)
"""


def test_code_has_one_name_in_all_processes() -> None:
    named = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in "1234"
    ]
    assert len({process.communicate(timeout=120)[0] for process in named}) == 1


def test_workers_of_one_host_compile_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    workers = [Inductor(tmp_path, torch.device("cpu")) for _ in range(3)]
    module, kwargs = Denoiser(12), call(2, 12)
    wanted = target(module)
    for worker in workers * CALLS_BEFORE:
        worker.run(wanted, (), kwargs)
    for worker in workers:
        worker.wait()
        assert isinstance(worker.function(wanted, (), kwargs), Compiled)
        worker.close()
    told = [record.message.split(" in ")[0] for record in caplog.records]
    assert sorted(told) == [
        *["compiled Denoiser.forward", "compiling Denoiser.forward"],
        *["loaded code of Denoiser.forward"] * 2,
    ]


def test_workers_load_side_by_side_and_what_a_killed_compilation_left_is_no_hindrance(
    tmp_path: Path,
) -> None:
    module, kwargs = Denoiser(12), call(2, 12)
    wanted, earlier = target(module), Inductor(tmp_path, torch.device("cpu"))
    order = Order.of(module, "forward", LAYOUT, kwargs)
    left = tmp_path / f"code-{order.digest}.tmp"
    (left / "code").mkdir(parents=True)
    warmed(earlier, wanted, kwargs)
    assert not left.exists()
    later = Inductor(tmp_path, torch.device("cpu"))
    with open(tmp_path / f"code-{order.digest}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another worker that loads
        later.run(wanted, (), kwargs)
        later.wait()
    assert isinstance(later.function(wanted, (), kwargs), Compiled)


def test_code_that_cannot_be_loaded_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, kwargs = Denoiser(12), call(2, 12)
    wanted, earlier = target(module), Inductor(tmp_path, torch.device("cpu"))
    warmed(earlier, wanted, kwargs)
    (code,) = tmp_path.glob("code-*/code")
    code.write_bytes(code.read_bytes()[:1000])
    later = Inductor(tmp_path, torch.device("cpu"))
    later.run(wanted, (), kwargs)
    later.wait()
    assert "cannot load code of Denoiser.forward" in caplog.text
    torch.testing.assert_close(later.run(wanted, (), kwargs)[0], module(**kwargs)[0])


def test_more_rows_than_the_code_is_for_run_uncompiled(inductor: Inductor) -> None:
    module = Denoiser()
    wanted = target(module)
    warmed(inductor, wanted, call(2))
    assert isinstance(inductor.function(wanted, (), call(MAX_ROWS)), Compiled)
    assert inductor.function(wanted, (), call(MAX_ROWS + 1)) == wanted.run


def test_weights_of_other_looks_run_uncompiled(inductor: Inductor) -> None:
    module = Denoiser()
    warmed(inductor, target(module), call(2))
    code = inductor.function(target(module), (), call(2))
    assert isinstance(code, Compiled)
    assert code.code.fits(module)
    assert not code.code.fits(Denoiser(16))
    half = Denoiser()
    half.layer.bias = nn.Parameter(half.layer.bias.half())  # its first weight is as it was
    wanted = target(half)
    assert inductor.function(wanted, (), call(2)) == wanted.run


def test_a_decoder_in_tiles_runs_uncompiled(inductor: Inductor) -> None:
    module = Decoder()
    decode, latents = target(module, "decode", "z"), torch.randn(1, 8)
    warmed(inductor, decode, {"z": latents})
    assert isinstance(inductor.function(decode, (), {"z": latents}), Compiled)
    module.use_tiling = True  # type: ignore[assignment]
    assert inductor.function(decode, (), {"z": latents}) == decode.run


def test_calls_run_uncompiled_until_the_code_is_ready(inductor: Inductor) -> None:
    module = Denoiser(20)
    wanted, kwargs = target(module), call(2, 20)
    for _ in range(CALLS_BEFORE):
        assert inductor.function(wanted, (), kwargs) == wanted.run
    inductor.wait()
    assert isinstance(inductor.function(wanted, (), kwargs), Compiled)
    torch.testing.assert_close(inductor.run(wanted, (), kwargs)[0], module(**kwargs)[0])


def test_one_compilation_serves_all_rows_all_modules_and_new_weights(inductor: Inductor) -> None:
    first, second = Denoiser(), Denoiser()
    warmed(inductor, target(first), call(2))
    begun = len(inductor._codes)
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
    assert len(inductor._codes) == begun


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


def test_a_decoder_is_compiled_for_calls_with_a_generator_that_it_does_not_read(
    inductor: Inductor,
) -> None:
    module, latents = SamplingDecoder(), torch.randn(1, 8)
    decode = Target(module.eval(), "decode", Layout("z", unread=frozenset({"generator"})))
    kwargs = {"z": latents, "generator": torch.Generator()}
    warmed(inductor, decode, kwargs)
    begun = len(inductor._codes)
    for generator in (torch.Generator(), [torch.Generator()], None):
        code = inductor.function(decode, (), {"z": latents, "generator": generator})
        assert isinstance(code, Compiled)
        made = code(z=latents, generator=generator)
        torch.testing.assert_close(made, module.decode(latents, None))
    assert isinstance(inductor.function(decode, (), {"z": latents}), Compiled)
    assert len(inductor._codes) == begun


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
