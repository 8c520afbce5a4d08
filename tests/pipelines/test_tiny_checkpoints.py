"""The tiny checkpoints load with stock Diffusers and make pictures that depend on what is asked."""

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from tests.tools import tiny, tiny_lora
from tests.tools.tiny_families import FAMILIES

BASES = ("sd15", "sd21", "sdxl")
STEPS = {"sdxl_turbo": {"num_inference_steps": 1, "guidance_scale": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        tiny.build_checkpoint(top / family, family)
    return top


def load(path: Path, **parts: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gradient(angle: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(angle).resize((64, 64)).convert("RGB")


def picture(pipe: Any, prompt: str = "a lighthouse", seed: int = 7, **parameters: Any) -> Any:
    """[height, width, channel] from 0 to 1."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = {"num_inference_steps": 4, "output_type": "np"} | parameters
    return pipe(prompt, generator=generator, **values).images[0]


def difference(one: Any, other: Any) -> float:
    """Root mean square, of a range of 1."""
    return float(np.sqrt(np.mean((one - other) ** 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_depends_on_prompt_and_seed(folder: Path, family: str) -> None:
    pipe = load(folder / family)
    given = STEPS.get(family, {})
    if family == "sdxl_refiner":
        given = {"image": gradient(0), "strength": 0.9}
    first = picture(pipe, **given)
    assert first.shape == (64, 64, 3)
    assert np.isfinite(first).all()
    assert 0.1 < first.std() < 0.4
    assert np.array_equal(first, picture(pipe, **given))
    assert difference(first, picture(pipe, prompt="two owls", **given)) > 0.01
    assert difference(first, picture(pipe, seed=8, **given)) > 0.1


def test_the_families_differ_where_the_published_ones_do(folder: Path) -> None:
    def config(family: str, part: str) -> Any:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return json.loads((folder / family / part / name).read_text())

    assert config("sd21", "scheduler")["prediction_type"] == "v_prediction"
    assert config("sd21", "unet")["use_linear_projection"] is True
    assert config("sd15", "unet")["use_linear_projection"] is False
    assert config("sdxl", "unet")["addition_embed_type"] == "text_time"
    assert config("sdxl", "vae")["force_upcast"] is True
    assert config("sdxl_turbo", "scheduler")["timestep_spacing"] == "trailing"
    refiner = json.loads((folder / "sdxl_refiner" / "model_index.json").read_text())
    assert refiner["requires_aesthetics_score"] is True
    assert refiner["text_encoder"] == [None, None]
    sidecar = json.loads((folder / "sdxl_turbo" / "igi.json").read_text())
    assert sidecar == {"num_inference_steps": 1, "guidance_scale": 0.0}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(
        (path / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()


def test_weights_follow_from_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    same = tiny.build_checkpoint(tmp_path / "same", "sd15")
    other = tiny.build_checkpoint(tmp_path / "other", "sd15", seed=1)
    assert fingerprint(same) == fingerprint(folder / "sd15")
    assert fingerprint(other) != fingerprint(folder / "sd15")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_small(folder: Path, family: str) -> None:
    sizes = [path.stat().st_size for path in (folder / family).rglob("*") if path.is_file()]
    assert sum(sizes) < 2.5 * 2**20


def test_copied_weights_give_the_same_picture_as_the_file(folder: Path) -> None:
    pipe = load(folder / "sd21")
    mapped = picture(pipe)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in part.parameters():
            parameter.data = parameter.data.clone()
    assert np.array_equal(mapped, picture(pipe))


def test_every_text_has_tokens_of_its_own(folder: Path) -> None:
    tokens = load(folder / "sd15").tokenizer
    assert tokens.model_max_length == 77
    texts = ["", "a", "ab", "a b", "ba", "a, b", "é", "😀", "~", "0 1"]
    assert len({tuple(tokens(text).input_ids) for text in texts}) == len(texts)


@pytest.mark.parametrize("family", BASES)
def test_a_controlnet_and_its_picture_show(folder: Path, family: str, tmp_path: Path) -> None:
    plain = load(folder / family)
    controlnet = diffusers.ControlNetModel.from_pretrained(tiny.build_controlnet(tmp_path, family))
    size = "XL" if family == "sdxl" else ""
    kind = getattr(diffusers, f"StableDiffusion{size}ControlNetPipeline")
    pipe = kind.from_pretrained(folder / family, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    first = picture(pipe, image=gradient(0))
    assert difference(first, picture(plain)) > 0.05
    assert difference(first, picture(pipe, image=gradient(90))) > 0.01


@pytest.mark.parametrize("family", BASES)
def test_another_vae_shows_and_one_of_the_same_seed_does_not(
    folder: Path, family: str, tmp_path: Path
) -> None:
    first = picture(load(folder / family))
    for seed, shows in ((0, False), (1, True)):
        path = tiny.build_vae(tmp_path / str(seed), family, seed)
        pipe = load(folder / family, vae=diffusers.AutoencoderKL.from_pretrained(path))
        assert (difference(first, picture(pipe)) > 0.05) is shows


def layers_changed(pipe: Any, part: str) -> int:
    module = pipe.components.get(part) or torch.nn.Module()
    return sum(".lora_A." in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("family", BASES)
def test_a_lora_shows_and_both_layouts_are_the_same(
    folder: Path, family: str, tmp_path: Path
) -> None:
    plain = picture(load(folder / family))
    pictures = []
    for layout in tiny_lora.LAYOUTS:
        path = tiny_lora.build_lora(tmp_path / f"{layout}.safetensors", family, layout)
        pipe = load(folder / family)
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        pictures.append(picture(pipe))
        for part in ("unet", "text_encoder", "text_encoder_2"):
            assert layers_changed(pipe, part) == sum(
                named == part for named, _, _ in tiny_lora.targets(family)
            )
    assert difference(plain, pictures[0]) > 0.05
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("flags", [True, False])
def test_a_safety_checker_flags_all_pictures_or_none(
    folder: Path, flags: bool, tmp_path: Path
) -> None:
    path = tiny.build_safety_checker(tmp_path, flags)
    pipe = load(
        folder / "sd15",
        safety_checker=StableDiffusionSafetyChecker.from_pretrained(path),
        feature_extractor=CLIPImageProcessor.from_pretrained(path),
    )
    assert pipe("a lighthouse", num_inference_steps=1).nsfw_content_detected == [flags]
