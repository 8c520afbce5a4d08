"""A single file on a CPU: copied once, then taken again without a weight being moved."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker import host_copies
from gpu_worker.holdings import Holding
from gpu_worker.host_copies import BOUNDARY_BYTES, HostCopies, HostCopy
from gpu_worker.host_tier import HostTier
from gpu_worker.library import Library
from ipc.messages import Model
from tests.tools import single_file

BUDGET = 2**30
WEIGHTS = {"scalar": torch.tensor(1.5), "odd": torch.arange(3.0), "even": torch.ones(4, 4).T}


@pytest.fixture
def copies_made(monkeypatch: pytest.MonkeyPatch) -> list[HostCopy]:
    made: list[HostCopy] = []

    class Counted(HostCopy):
        def __init__(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
            super().__init__(weights, dtype)
            made.append(self)

    monkeypatch.setattr(host_copies, "HostCopy", Counted)
    return made


@pytest.fixture
def model(tiny_models: Path, tmp_path: Path) -> Model:
    path = single_file.write_checkpoint(tiny_models / "sd15", "sd15", tmp_path / "m.safetensors")
    config = single_file.copy_configs(tiny_models / "sd15", tmp_path / "configs")
    return Model(name="m", path=str(path), family="sd15", single_file=True, config=str(config))


def state(holding: Holding) -> dict[str, torch.Tensor]:
    modules = ((n, part) for n, part in holding.parts.items() if isinstance(part, torch.nn.Module))
    return {f"{n}.{name}": t for n, module in modules for name, t in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_is_of_its_type_and_on_boundaries(dtype: torch.dtype) -> None:
    copied = HostCopy(WEIGHTS, dtype).weights()
    for name, tensor in copied.items():
        assert torch.equal(tensor, WEIGHTS[name].to(dtype))
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % BOUNDARY_BYTES == 0


def test_what_is_written_to_a_copys_weights_is_seen_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in WEIGHTS.items()}, path)
    mapped, copies = HostTier("cpu", BUDGET).weights([path]), HostCopies(BUDGET)
    one, two = (copies.take("part", mapped, torch.float32) for _ in range(2))
    one["even"].zero_()
    three = copies.take("part", mapped, torch.float32)
    for seen in (two, three, mapped, load_file(path)):
        assert torch.equal(seen["even"], torch.ones(4, 4))


def test_a_checkpoint_that_comes_back_is_not_copied_again(
    model: Model, copies_made: list[HostCopy]
) -> None:
    library = Library("cpu", torch.float32, BUDGET, lambda: None)
    before = {name: tensor.clone() for name, tensor in state(library.checkpoint(model)).items()}
    assert len(copies_made) == 3
    with torch.no_grad():
        for tensor in state(library.checkpoint(model)).values():
            tensor.zero_()  # as a LoRA that is merged writes to some
    library.unload(model.path)
    again = state(library.checkpoint(model))
    assert len(copies_made) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in again.items())


def test_a_file_that_was_replaced_is_copied_anew(
    model: Model, copies_made: list[HostCopy], tmp_path: Path
) -> None:
    library = Library("cpu", torch.float32, BUDGET, lambda: None)
    library.checkpoint(model)
    library.unload(model.path)
    newer = shutil.copyfile(model.path, tmp_path / "newer")
    Path(newer).replace(model.path)
    library.checkpoint(model)
    assert len(copies_made) == 6


def test_the_copies_that_were_used_last_stay(copies_made: list[HostCopy]) -> None:
    size = HostCopy(WEIGHTS, torch.float32).bytes
    copies = HostCopies(2 * size)
    for key in ("a", "b", "a", "c", "a"):
        copies.take(key, WEIGHTS, torch.float32)
    assert (len(copies_made), copies.bytes) == (3, 2 * size)
    copies.take("b", WEIGHTS, torch.float32)
    assert len(copies_made) == 4


def test_copies_stay_within_the_hosts_budget_and_go_with_the_idle_models(
    model: Model, copies_made: list[HostCopy]
) -> None:
    library = Library("cpu", torch.float32, BUDGET, lambda: None, host_bytes=1000)
    for _ in range(2):
        library.checkpoint(model)
        library.unload(model.path)
    assert len(copies_made) == 6  # they do not fit: made each time, and kept by nobody
    roomy = Library("cpu", torch.float32, BUDGET, lambda: None)
    for _ in range(2):
        roomy.checkpoint(model)
        assert roomy.drop_idle()
    assert len(copies_made) == 12
