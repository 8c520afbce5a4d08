"""Single files inside the worker: every tensor finds its place, and none is guessed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from gpu_worker import folders, single_files
from gpu_worker.folders import BrokenModel
from gpu_worker.original_names import Tensors
from gpu_worker.single_files import SingleFile
from ipc.messages import Model
from supervisor.file_families import file_traits
from supervisor.headers import read_header
from tests.tools import single_file

FAMILIES = ("sd15", "sd21", "sdxl", "sdxl_refiner")
UNET = "model.diffusion_model."
COPIED = single_files.copied_to("cpu", torch.float32)


@pytest.fixture(scope="module")
def written(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Each family's folder as a single file."""
    root = tmp_path_factory.mktemp("written")
    found = {}
    for family in FAMILIES:
        path = root / f"{family}.safetensors"
        single_file.write_checkpoint(tiny_models / family, family, path)
        config = single_file.copy_configs(tiny_models / family, root / "configs" / family)
        found[family] = Model(name=family, path=str(path), single_file=True, config=str(config))
    return found


def modules_of(folder: Path) -> dict[str, Any]:
    """A folder's modules, as the worker loads them from it."""
    listed = folders.parts(folders.read_json(folder / "model_index.json"))
    kinds = {name: folders.part_class(*part) for name, part in listed.items() if part}
    loaded = {
        name: folders.load_part(folder / name, kind, torch.float32) for name, kind in kinds.items()
    }
    return {name: part for name, part in loaded.items() if isinstance(part, torch.nn.Module)}


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert one.training == other.training


def loaded(model: Model, name: str, kind: type[Any]) -> Any:
    return SingleFile(model).load_part(name, kind, torch.float32, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_has_the_weights_of_its_folder(
    written: dict[str, Model], tiny_models: Path, family: str
) -> None:
    for name, expected in modules_of(tiny_models / family).items():
        assert_equal(loaded(written[family], name, type(expected)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_and_the_supervisor_read_the_files_of_these_tests_alike(
    written: dict[str, Model], tiny_models: Path, family: str
) -> None:
    model = written[family]
    header = read_header(Path(model.path))
    assert file_traits("checkpoint", header.tensors, header.metadata).family == family
    kind = getattr(diffusers, diffusers.DiffusionPipeline.load_config(model.config)["_class_name"])
    pipe = kind.from_single_file(model.path, config=model.config, local_files_only=True)
    for name, expected in modules_of(tiny_models / family).items():
        assert_equal(getattr(pipe, name).eval(), expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_room_that_a_file_needs_is_that_of_its_parts(
    written: dict[str, Model], tiny_models: Path, family: str
) -> None:
    parts = modules_of(tiny_models / family).values()
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert SingleFile(written[family]).bytes(torch.float16) == pytest.approx(2 * count, rel=0.001)


def test_weights_on_odd_boundaries_are_moved_to_even_ones(
    written: dict[str, Model], tmp_path: Path
) -> None:
    path = Path(written["sd15"].path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for padding in (0, 8):  # one of the two is off
        other = tmp_path / f"{padding}.safetensors"
        start = (data - 8 + padding).to_bytes(8, "little") + whole[8:data] + b" " * padding
        other.write_bytes(start + whole[data:])
        model = Model(name="m", path=str(other), single_file=True, config=written["sd15"].config)
        module = loaded(model, "unet", diffusers.UNet2DConditionModel)
        assert all(parameter.data_ptr() % 16 == 0 for parameter in module.parameters())


def without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ending)}


def with_more(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


DEEP = "input_blocks.2.1.transformer_blocks.0."
BROKEN: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "a weight of the UNet": ("unet", without(DEEP + "attn1.to_q.weight"), "lacks down_blocks.0"),
    "the UNet's beginning": ("unet", without("input_blocks.0.0.weight"), "lacks conv_in.weight"),
    "a motion module": (
        "unet",
        with_more(UNET + DEEP + "fuser.linear.weight", torch.ones(2)),
        "has, where none belongs, down_blocks.0.*fuser",
    ),
    "another width": (
        "unet",
        with_more(UNET + "out.2.weight", torch.ones(4, 12, 3, 3)),
        "not shaped as its family's: see conv_out.weight",
    ),
    "a weight of the VAE": ("vae", without("decoder.mid.attn_1.k.bias"), "lacks decoder.mid_block"),
    "the VAE": ("vae", lambda tensors: {}, "holds no vae"),
    "a weight of the text encoder": (
        "text_encoder",
        without("layers.1.mlp.fc1.weight"),
        "CLIPTextModel lacks encoder.layers.1.mlp.fc1.weight",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_whole_is_refused_by_name(
    written: dict[str, Model], tiny_models: Path, what: str
) -> None:
    name, change, complaint = BROKEN[what]
    tensors = change(single_files.read(written["sd15"]))
    kind = type(modules_of(tiny_models / "sd15")[name])
    file = SingleFile(written["sd15"], tensors)
    with pytest.raises(BrokenModel, match=complaint):
        file.load_part(name, kind, torch.float32, "cpu")


def test_text_encoders_from_before_transformers_had_a_prefix_are_read_too(
    written: dict[str, Model], tiny_models: Path
) -> None:
    tensors = {name.replace(".text_model.", "."): tensor
               for name, tensor in single_files.read(written["sd15"]).items()}  # fmt: skip
    expected = modules_of(tiny_models / "sd15")["text_encoder"]
    file = SingleFile(written["sd15"], tensors)
    assert_equal(file.load_part("text_encoder", type(expected), torch.float32, "cpu"), expected)


def test_a_file_that_is_no_safetensors_is_never_opened_otherwise(
    written: dict[str, Model], tmp_path: Path
) -> None:
    path = tmp_path / "pickle.safetensors"
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, path)
    model = Model(name="m", path=str(path), single_file=True, config=written["sd15"].config)
    with pytest.raises(BrokenModel, match="not whole safetensors"):
        SingleFile(model)


@pytest.mark.parametrize("layout", ["ldm", "bare", "diffusers"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_controlnet_takes_its_shape_from_a_unet_and_its_own_inputs(
    written: dict[str, Model], model_dir: Path, tmp_path: Path, family: str, layout: str
) -> None:
    folder = model_dir / "controlnet" / f"{family}-a"
    path = single_file.write_controlnet(folder, tmp_path / "net.safetensors", layout)
    model = Model(name="m", path=str(path), single_file=True, config=written[family].config)
    plan = single_files.module_plan(model, "controlnet")
    assert_equal(single_files.built(plan, COPIED),
                 folders.load_module(folder, torch.float32))  # fmt: skip


def test_a_controlnet_of_differences_is_refused(
    written: dict[str, Model], model_dir: Path, tmp_path: Path
) -> None:
    tensors = single_file.weights(model_dir / "controlnet" / "sd15-a") | {
        "difference": torch.ones(0)
    }
    path = single_file.write(tmp_path / "net.safetensors", tensors)
    model = Model(name="m", path=str(path), single_file=True, config=written["sd15"].config)
    with pytest.raises(BrokenModel, match="differences"):
        single_files.module_plan(model, "controlnet")


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers", "early"])
def test_a_vae_is_read_in_every_layout(
    written: dict[str, Model], model_dir: Path, tmp_path: Path, layout: str
) -> None:
    folder = model_dir / "vae" / "sdxl"
    path = single_file.write_vae(folder, tmp_path / "vae.safetensors", layout)
    model = Model(name="m", path=str(path), single_file=True, config=written["sdxl"].config)
    vae = single_files.built(single_files.module_plan(model, "vae"), COPIED)
    assert_equal(vae, folders.load_module(folder, torch.float32))
    assert vae.config.scaling_factor == 0.13025


def test_a_vae_file_does_not_go_with_a_checkpoint_whose_vae_is_of_another_class(
    written: dict[str, Model], model_dir: Path, tmp_path: Path
) -> None:
    config = shutil.copytree(str(written["sd15"].config), tmp_path / "config")
    (config / "vae/config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    path = single_file.write_vae(model_dir / "vae" / "sd15", tmp_path / "vae.safetensors")
    model = Model(name="m", path=str(path), single_file=True, config=str(config))
    with pytest.raises(BrokenModel, match="AutoencoderTiny"):
        single_files.module_plan(model, "vae")
