"""Checkpoints exchanged in place: a module is then as if it had been loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from gpu_worker import folders, slots
from gpu_worker.failures import MemoryShort
from gpu_worker.host_tier import CannotMap, HostTier, MappedFile
from gpu_worker.library import Library
from gpu_worker.modules import Modules
from gpu_worker.slots import DoesNotFit, Spares, exchange, lay_out, signature, skeleton
from ipc.messages import Model
from tests.tools import tiny

PARTS = [
    (family, part)
    for family in ("sd15", "sdxl")
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else []))
]
BUDGET = 2**30


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second checkpoint of each of the two families."""
    root = tmp_path_factory.mktemp("other")
    for family in ("sd15", "sdxl"):
        tiny.build_checkpoint(root / family, family, seed=1)
    return root


def kind_of(checkpoint: Path, part: str) -> type[Any]:
    listed = folders.parts(folders.read_json(checkpoint / folders.PIPELINE_INDEX))[part]
    assert listed is not None
    return folders.part_class(*listed)


def config_of(folder: Path, kind: type[Any]) -> Any:
    if issubclass(kind, ModelMixin):
        return folders.read_json(folder / "config.json")
    return kind.config_class.from_pretrained(folder)


def weights_of(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return HostTier("cpu", BUDGET).weights(folders.weights(folder, dtype))


def assert_the_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert one.training == other.training
    for mine, theirs in (
        (one.state_dict(), other.state_dict()),
        (dict(one.named_buffers()), dict(other.named_buffers())),
    ):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name]), name
    gradients = [[p.requires_grad for p in each.parameters()] for each in (one, other)]
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_a_module_with_exchanged_weights_is_as_if_loaded(
    family: str, part: str, dtype: torch.dtype, tiny_models: Path, other: Path
) -> None:
    kind = kind_of(tiny_models / family, part)
    module = folders.load_part(tiny_models / family / part, kind, dtype)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    exchange(module, weights_of(other / family / part, dtype))
    assert_the_same(module, folders.load_part(other / family / part, kind, dtype))
    assert places == [parameter.data_ptr() for parameter in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_a_filled_skeleton_is_as_if_loaded(
    family: str, part: str, dtype: torch.dtype, tiny_models: Path
) -> None:
    folder = tiny_models / family / part
    kind = kind_of(tiny_models / family, part)
    built = skeleton(kind, config_of(folder, kind), dtype, torch.device("cpu"))
    assert built is not None
    exchange(built, weights_of(folder, dtype))
    assert_the_same(built, folders.load_part(folder, kind, dtype))


def test_a_modules_layout_in_memory_outlives_an_exchange(tiny_models: Path, other: Path) -> None:
    parts, paths = ("unet", "vae"), [root / "sd15" for root in (tiny_models, other)]
    layout = torch.channels_last
    modules = Modules("cpu", torch.float32, HostTier("cpu", BUDGET), layout)
    for part in parts:
        kind = kind_of(paths[0], part)
        first = modules.make(modules.of_folder(paths[0] / part, kind))
        modules.spare({part: first})
        second = modules.make(modules.of_folder(paths[1] / part, kind))
        assert second is first
        assert_the_same(second, folders.load_part(paths[1] / part, kind, torch.float32))
        weights = [each for each in second.parameters() if each.dim() == 4]
        assert all(weight.is_contiguous(memory_format=layout) for weight in weights)


def test_only_weights_of_four_dimensions_are_laid_out_anew() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv3d(4, 8, 3))
    before = [parameter.clone() for parameter in module.parameters()]
    lay_out(module, torch.channels_last)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert module[1].weight.is_contiguous()
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))


def test_weights_of_1_x_1_are_laid_out_by_their_strides_too() -> None:
    module = torch.nn.Conv2d(4, 8, 1)
    lay_out(module, torch.channels_last)
    assert module.weight.stride() == (4, 1, 4, 4)
    lay_out(module, torch.contiguous_format)
    assert module.weight.stride() == (4, 1, 1, 1)


def test_a_model_too_large_for_the_device_drops_no_other(tiny_models: Path) -> None:
    models = [Model(name=name, path=str(tiny_models / name)) for name in ("sd15", "sdxl")]
    roomy = Library("cpu", torch.float32, BUDGET, lambda: None)
    sizes = [roomy.checkpoint(model).bytes for model in models]
    assert sizes[1] > sizes[0]
    library = Library("cpu", torch.float32, sizes[1] - 1, lambda: None)
    library.checkpoint(models[0])
    with pytest.raises(MemoryShort):
        library.checkpoint(models[1])
    assert [each.checkpoint for each in library.residents()] == ["sd15"]
    assert library.held_bytes() > 0


def test_the_checkpoints_in_the_way_are_those_with_the_fewest_pictures(tiny_models: Path) -> None:
    library = Library("cpu", torch.float32, BUDGET, lambda: None)
    many, few, _ = (
        library.checkpoint(Model(name=name, path=str(tiny_models / name)))
        for name in ("sd15", "sd21", "sdxl")
    )
    with library.use(many), library.use(few, many):
        most, least = many.model.path, few.model.path
        assert library.in_the_way(1, set()) == (least,)
        assert library.in_the_way(1, {least}) == (most,)
        assert library.in_the_way(few.bytes + 1, set()) == (least, most)
        assert library.in_the_way(few.bytes + many.bytes + 1, set()) == ()


def test_weights_that_lack_something_change_nothing(tiny_models: Path, other: Path) -> None:
    folder = tiny_models / "sd15" / "unet"
    module = folders.load_part(folder, kind_of(tiny_models / "sd15", "unet"), torch.float32)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = weights_of(other / "sd15" / "unet", torch.float32)
    with pytest.raises(DoesNotFit, match=r"conv_out\.bias is missing"):
        exchange(module, {name: each for name, each in weights.items() if name != "conv_out.bias"})
    with pytest.raises(DoesNotFit, match="should be"):
        exchange(module, weights | {"conv_out.bias": torch.zeros(3)})
    assert all(torch.equal(before[name], each) for name, each in module.state_dict().items())


def test_old_names_of_a_vae_find_their_places(tiny_models: Path) -> None:
    folder = tiny_models / "sd15" / "vae"
    module = folders.load_part(folder, kind_of(tiny_models / "sd15", "vae"), torch.float32)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    renamed = {}
    for name, tensor in weights_of(folder, torch.float32).items():
        for new, old in slots.OLD_ATTENTION.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    assert any(".query." in name for name in renamed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    exchange(module, renamed)
    assert all(torch.equal(before[name], each) for name, each in module.state_dict().items())


def test_one_of_two_names_is_enough_for_a_shared_tensor() -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Linear(2, 2, bias=False)
    module.second = torch.nn.Linear(2, 2, bias=False)
    module.second.weight = module.first.weight
    exchange(module, {"second.weight": torch.full((2, 2), 3.0)})
    assert module.first.weight.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_signatures_tell_architectures_and_types_apart(tiny_models: Path) -> None:
    kind = kind_of(tiny_models / "sd15", "unet")
    config = folders.read_json(tiny_models / "sd15" / "unet" / "config.json")
    here = signature(kind, config, torch.float32)
    assert here == signature(kind, config | {"_name_or_path": "elsewhere"}, torch.float32)
    assert here != signature(kind, config, torch.float16)
    assert here != signature(kind, config | {"cross_attention_dim": 1}, torch.float32)


def test_spares_are_taken_once_and_dropped_when_they_are_of_no_use() -> None:
    spares, wanted, unwanted = Spares(), torch.nn.Identity(), torch.nn.Identity()
    spares.put("wanted", wanted)
    spares.put("unwanted", unwanted)
    assert spares.keep_only(["wanted", "wanted", "absent"])
    assert not spares.keep_only(["wanted"])
    assert spares.take("unwanted") is None
    assert spares.take("wanted") is wanted
    assert spares.take("wanted") is None


def test_the_host_keeps_what_was_used_last(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for index, file in enumerate(files):
        save_file({"weight": torch.full((1000,), float(index))}, file)
    host = HostTier("cpu", 2 * files[0].stat().st_size)
    kept = host.weights([files[0]])["weight"]
    host.weights([files[1]])
    host.weights([files[0]])
    host.weights([files[2]])
    assert [host.holds([file]) for file in files] == [True, False, True]
    assert host.bytes == 2 * files[0].stat().st_size
    host.clear()
    assert host.bytes == 0
    assert kept.tolist() == [0.0] * 1000


def test_a_file_that_was_replaced_is_mapped_anew(tmp_path: Path) -> None:
    file, newer = tmp_path / "weights.safetensors", tmp_path / "newer.safetensors"
    save_file({"weight": torch.zeros(3)}, file)
    save_file({"weight": torch.ones(4)}, newer)
    host = HostTier("cpu", BUDGET)
    assert host.weights([file])["weight"].tolist() == [0, 0, 0]
    newer.replace(file)
    assert not host.holds([file])
    assert host.weights([file])["weight"].tolist() == [1, 1, 1, 1]


def test_mapped_tensors_are_those_of_the_file(tiny_models: Path) -> None:
    (file,) = (tiny_models / "sd15" / "vae").glob("*.safetensors")
    expected, mapped = load_file(file), MappedFile(file).weights
    assert expected.keys() == mapped.keys()
    assert all(torch.equal(expected[name], mapped[name]) for name in expected)


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        (1000).to_bytes(8, "little") + b"{}",
        (12).to_bytes(8, "little") + b"[1, 2, 3, 4]",
        (63).to_bytes(8, "little")
        + b'{"weight":{"dtype":"F32","shape":[4],"data_offsets":[0, 160]}}  '
        + bytes(16),
        (63).to_bytes(8, "little")
        + b'{"weight":{"dtype":"F32","shape":[5],"data_offsets":[0,  16]}}  '
        + bytes(16),
    ],
)
def test_what_is_not_whole_safetensors_is_not_mapped(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(CannotMap):
        MappedFile(file)
