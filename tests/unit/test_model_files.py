"""Single files, sidecars, and models that must fit each other."""

import json
from pathlib import Path

import pytest

from supervisor.errors import Problem
from supervisor.families import Kind
from supervisor.models import Models
from tests.tools import weights
from tests.tools.model_folders import LORA, refusal
from tests.tools.weights import files, safetensors


@pytest.mark.usefixtures("sd15")
def test_a_sidecar_tells_family_prediction_type_and_defaults(models: Models, root: Path) -> None:
    told = {"family": "sd21", "prediction_type": "v_prediction", "num_inference_steps": 4}
    told["scheduler"] = "LCMScheduler"
    (root / "checkpoints" / "sd15" / "igi.json").write_text(json.dumps(told))
    found = models.resolve("checkpoint", "sd15")
    assert (found.model.family, found.model.prediction_type) == ("sd21", "v_prediction")
    assert found.defaults == {"num_inference_steps": 4, "scheduler": "LCMScheduler"}
    assert found.scheduler == "LCMScheduler"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"family": "sd3"}', "family"),
        ('{"num_inference_steps": 0}', "num_inference_steps"),
        ('{"guidance_scale": "high"}', "guidance_scale"),
        ('{"width": 500.5}', "width"),
        ('{"famly": "sd15"}', "famly"),
        ("{", "style.json"),
        ("[" * 100_000, "style.json"),
    ],
)
def test_a_bad_sidecar_is_refused_by_its_field(
    models: Models, root: Path, text: str, named: str
) -> None:
    (root / "lora" / "style.json").write_text(text)
    problem = refusal(models, "lora", "style.safetensors")
    assert problem.code == "invalid_model"
    assert named in problem.detail


def test_a_lora_resolves_with_its_family(models: Models) -> None:
    found = models.resolve("lora", "style.safetensors")
    assert found.model.single_file
    assert found.model.family == "sd15"


def test_a_model_of_another_kind_is_told_as_what_it_is(models: Models, root: Path) -> None:
    safetensors(root / "checkpoints" / "style.safetensors", LORA)
    problem = refusal(models, "checkpoint", "style.safetensors")
    assert problem.code == "incompatible_model"
    assert "it is a LoRA, not a checkpoint" in problem.detail
    files(root / "vae" / "whole", weights.checkpoint_files("sd15"))
    assert refusal(models, "vae", "whole").code == "incompatible_model"
    files(root / "checkpoints" / "lone", {"config.json": {"_class_name": "AutoencoderKL"}})
    assert "it is a AutoencoderKL" in refusal(models, "checkpoint", "lone").detail


VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.13025}


@pytest.mark.usefixtures("sd15", "sdxl")
def test_a_vae_folder_resolves_and_must_fit(models: Models, root: Path) -> None:
    files(root / "vae" / "fix", {"config.json": VAE, "x.safetensors": {"weight": (2,)}})
    found = models.resolve("vae", "fix")
    models.check_fit(models.resolve("checkpoint", "sdxl"), [found])
    with pytest.raises(Problem, match=r"'fix'.*'sd15' \(family sd15\)") as caught:
        models.check_fit(models.resolve("checkpoint", "sd15"), [found])
    assert (caught.value.code, caught.value.field) == ("incompatible_model", "vae")


@pytest.mark.usefixtures("sd15", "sdxl")
def test_a_lora_of_another_family_is_refused_naming_both(models: Models) -> None:
    lora = models.resolve("lora", "style.safetensors")
    models.check_fit(models.resolve("checkpoint", "sd15"), [lora])
    with pytest.raises(Problem, match=r"style.*family sd15.*family sdxl") as caught:
        models.check_fit(models.resolve("checkpoint", "sdxl"), [lora])
    assert caught.value.field == "loras"


# Single files.


def single(root: Path, family: str, kind: str = "checkpoints") -> Path:
    return safetensors(root / kind / f"{family}.safetensors", weights.single_file_shapes(family))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sdxl_refiner"])
def test_a_single_file_takes_the_configurations_of_its_family(
    models: Models, root: Path, family: str
) -> None:
    path = single(root, family)
    files(root / "configs" / family, weights.config_files(family))
    found = models.resolve("checkpoint", f"{family}.safetensors")
    assert found.model.single_file
    assert found.model.path == str(path)
    assert found.model.config == str(root / "configs" / family)
    assert found.model.family == family
    assert found.scheduler == "DDIMScheduler"
    assert found.traits.scaling_factor == (0.13025 if "xl" in family else 0.18215)


def test_every_missing_configuration_is_named(models: Models, root: Path) -> None:
    single(root, "sd15")
    detail = refusal(models, "checkpoint", "sd15.safetensors").detail
    for name in weights.config_files("sd15"):
        assert f"configs/sd15/{name}" in detail


def test_a_missing_tokenizer_file_alone_is_named(models: Models, root: Path) -> None:
    single(root, "sdxl")
    files(root / "configs" / "sdxl", weights.config_files("sdxl"))
    (root / "configs" / "sdxl" / "tokenizer_2" / "vocab.json").unlink()
    problem = refusal(models, "checkpoint", "sdxl.safetensors")
    assert problem.code == "invalid_model"
    assert problem.detail.endswith("configs/sdxl/tokenizer_2/vocab.json")


def test_configurations_of_another_width_are_refused(models: Models, root: Path) -> None:
    single(root, "sd15")
    contents = weights.config_files("sd15")
    contents["unet/config.json"] = {"in_channels": 4, "cross_attention_dim": 32}
    files(root / "configs" / "sd15", contents)
    assert "configs/sd15" in refusal(models, "checkpoint", "sd15.safetensors").detail


def test_a_single_file_of_no_known_family_is_refused(models: Models, root: Path) -> None:
    shapes = {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (8,)}
    safetensors(root / "checkpoints" / "flux.safetensors", shapes)
    assert "Diffusers folders" in refusal(models, "checkpoint", "flux.safetensors").detail


@pytest.mark.parametrize("name", ["sd21.json", "sd21.safetensors.json"])
def test_a_sidecar_lies_beside_its_file(models: Models, root: Path, name: str) -> None:
    single(root, "sd21")
    files(root / "configs" / "sd21", weights.config_files("sd21"))
    (root / "checkpoints" / name).write_text('{"prediction_type": "epsilon", "width": 512}')
    found = models.resolve("checkpoint", "sd21.safetensors")
    assert found.model.prediction_type == "epsilon"
    assert found.defaults == {"width": 512}


@pytest.mark.usefixtures("sd15")
def test_a_lone_vae_or_controlnet_takes_its_checkpoints_configuration(
    models: Models, root: Path
) -> None:
    safetensors(root / "vae" / "v.safetensors", {"decoder.conv_in.weight": (8, 4, 3, 3)})
    hint = {"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}
    safetensors(root / "controlnet" / "c.safetensors", hint)
    checkpoint = models.resolve("checkpoint", "sd15")
    kinds: dict[Kind, str] = {"vae": "v.safetensors", "controlnet": "c.safetensors"}
    for kind, name in kinds.items():
        found = models.resolve(kind, name, checkpoint)
        assert found.model.config == checkpoint.model.path


def test_a_lone_vae_may_say_its_family_itself(models: Models, root: Path) -> None:
    safetensors(root / "vae" / "v.safetensors", {"decoder.conv_in.weight": (8, 4, 3, 3)})
    assert "known family" in refusal(models, "vae", "v.safetensors").detail
    (root / "vae" / "v.json").write_text('{"family": "sdxl"}')
    assert "configs/sdxl/vae/config.json" in refusal(models, "vae", "v.safetensors").detail
    files(root / "configs" / "sdxl", {"vae/config.json": VAE})
    found = models.resolve("vae", "v.safetensors")
    assert (found.model.config, found.traits.scaling_factor) == (
        str(root / "configs" / "sdxl"),
        0.13025,
    )


def test_an_oversized_sidecar_is_refused(models: Models, root: Path) -> None:
    (root / "lora" / "style.json").write_bytes(b" " * 70_000)
    assert "style.json" in refusal(models, "lora", "style.safetensors").detail
