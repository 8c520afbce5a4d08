"""Single files over HTTP: their pictures are those of the folder that they were written from."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.tools import local_hub, single_file, tiny
from tests.tools.compare import drawn, half_mask, noise_picture, over_http, pixels, stock
from tests.tools.server import RunningServer, running
from tests.tools.tiny_families import FAMILIES, architecture

TURBO = {"num_inference_steps": 1, "guidance_scale": 0, "a1111_scheduler": "Euler a SGM Uniform"}
ARCHITECTURES = ("sd15", "sd21", "sdxl", "sdxl_refiner")
CONTROLNETS = [("sd15", "ldm"), ("sd15", "diffusers"), ("sd21", "bare"), ("sdxl", "ldm"),
               ("sdxl", "diffusers")]  # fmt: skip
VAES = [("sd15", "ldm"), ("sd15", "early"), ("sd21", "prefixed"), ("sdxl", "diffusers")]
PLAIN = {"prompt": "a red fox in the snow", "num_inference_steps": 3, "width": 64, "height": 64}


def base_of(family: str) -> str:
    """The text-to-image pipeline."""
    return f"StableDiffusion{'XL' if architecture(family).startswith('sdxl') else ''}Pipeline"


def with_scheduler(folder: Path, copy: Path, **settings: Any) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


def inpainting(folder: Path, copy: Path) -> Path:
    """An sd15 checkpoint whose denoiser also reads a mask and a masked picture."""
    shutil.copytree(folder, copy)
    unet = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet")
    with tiny.seeded("sd15", "inpainting", 0):
        wide = diffusers.UNet2DConditionModel.from_config(unet.config, in_channels=9)
    for old in (copy / "unet").iterdir():
        old.unlink()
    wide.save_pretrained(copy / "unet")
    weights = single_file.weights(copy / "unet")
    tiny.save_aligned(weights, copy / "unet/diffusion_pytorch_model.safetensors")
    return copy


@pytest.fixture(scope="module")
def changed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models that tell something their family's configuration does not."""
    root, folders = tmp_path_factory.mktemp("changed"), model_dir / "checkpoints"
    with_scheduler(folders / "sd21", root / "sd21_base", prediction_type="epsilon")
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with_scheduler(folders / "sdxl", root / "sdxl_velocity", **told)
    inpainting(folders / "sd15", root / "sd15_inpaint")
    return root


@pytest.fixture(scope="module")
def singles(model_dir: Path, changed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MODEL_DIR of single files, their families' configurations, and one folder."""
    root, folders = tmp_path_factory.mktemp("singles"), model_dir / "checkpoints"
    places = {family: folders / family for family in FAMILIES}
    places |= {name: changed / name for name in ("sd21_base", "sdxl_velocity", "sd15_inpaint")}
    marks = {"sdxl_velocity": {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}}
    for name, folder in places.items():
        family = name if name in FAMILIES else name.split("_")[0]
        path = root / "checkpoints" / f"{name}.safetensors"
        single_file.write_checkpoint(folder, family, path, marks.get(name))
    (root / "checkpoints/sdxl_turbo.json").write_text(json.dumps(TURBO))
    sidecar = {"family": "sd21", "prediction_type": "epsilon"}
    (root / "checkpoints/sd21_base.safetensors.json").write_text(json.dumps(sidecar))
    shutil.copytree(folders / "sd15", root / "checkpoints" / "folder")
    told = shutil.copytree(folders / "sd21", root / "checkpoints" / "told")
    (told / "igi.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    for family in ARCHITECTURES:
        single_file.copy_configs(folders / family, root / "configs" / family)
    for family, layout in VAES:
        path = root / "vae" / f"{family}-{layout}.safetensors"
        single_file.write_vae(model_dir / "vae" / family, path, layout)
    for family, layout in CONTROLNETS:
        path = root / "controlnet" / f"{family}-{layout}.safetensors"
        single_file.write_controlnet(model_dir / "controlnet" / f"{family}-a", path, layout)
    shutil.copytree(model_dir / "lora", root / "lora")
    return root


@pytest.fixture(scope="module")
def server(singles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    data_dir = tmp_path_factory.mktemp("data")
    with running(data_dir, MODEL_DIR=str(singles), HUB_ALLOW="nobody") as server:
        yield server


def assert_same(server: RunningServer, name: str, pipe: Any, given: dict[str, Any],
                asked: dict[str, Any] | None = None, **more: Any) -> None:  # fmt: skip
    """`asked`: what HTTP is told where that differs from the pipeline's own call."""
    parameters = (given if asked is None else asked) | {"seed": 5}
    image = over_http(server, name, type(pipe).__name__, parameters, **more)[0]
    assert np.array_equal(pixels(image), pixels(drawn(pipe, 5, **given)))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_single_file_draws_what_its_folder_draws(
    server: RunningServer, model_dir: Path, family: str
) -> None:
    pipe = stock(model_dir / "checkpoints" / family, base_of(family))
    assert_same(server, f"{family}.safetensors", pipe, PLAIN)


def test_a_refiner_in_one_file_draws_what_its_folder_draws(
    server: RunningServer, model_dir: Path
) -> None:
    pipe = stock(model_dir / "checkpoints/sdxl_refiner", "StableDiffusionXLImg2ImgPipeline")
    given = {"prompt": "a red fox", "num_inference_steps": 3, "image": noise_picture(1)}
    given |= {"strength": 0.7}
    assert_same(server, "sdxl_refiner.safetensors", pipe, given)


def test_a_base_and_its_refiner_may_both_be_single_files(
    server: RunningServer, model_dir: Path
) -> None:
    given = PLAIN | {"num_inference_steps": 4, "denoising_end": 0.5}
    image = over_http(
        server, "sdxl.safetensors", base_of("sdxl"), given | {"seed": 5},
        refiner_model="sdxl_refiner.safetensors",
    )[0]  # fmt: skip
    base = stock(model_dir / "checkpoints/sdxl", base_of("sdxl"))
    latents = base(
        **given, generator=torch.Generator("cpu").manual_seed(5), output_type="latent"
    ).images
    refiner = stock(model_dir / "checkpoints/sdxl_refiner", "StableDiffusionXLImg2ImgPipeline")
    refined = drawn(refiner, 5, prompt=PLAIN["prompt"], num_inference_steps=4, image=latents,
                    denoising_start=0.5)  # fmt: skip
    assert np.array_equal(pixels(image), pixels(refined))


def test_a_turbo_in_one_file_takes_its_defaults_from_its_sidecar(
    server: RunningServer, model_dir: Path
) -> None:
    pipe = stock(model_dir / "checkpoints/sdxl_turbo", base_of("sdxl"))
    asked = {"prompt": "a red fox", "width": 64, "height": 64}
    given = asked | {"num_inference_steps": 1, "guidance_scale": 0.0}
    assert_same(server, "sdxl_turbo.safetensors", pipe, given, asked)


@pytest.mark.parametrize("name", ["sd21_base", "sdxl_velocity"])
def test_what_a_model_predicts_is_told_by_a_sidecar_or_by_marks_in_its_file(
    server: RunningServer, changed: Path, model_dir: Path, name: str
) -> None:
    family = name.split("_")[0]
    pipe = stock(changed / name, base_of(family))
    assert_same(server, f"{name}.safetensors", pipe, PLAIN)
    usual = stock(model_dir / "checkpoints" / family, base_of(family))
    assert not np.array_equal(pixels(drawn(usual, 5, **PLAIN)), pixels(drawn(pipe, 5, **PLAIN)))


def test_a_folders_sidecar_too_tells_what_its_model_predicts(
    server: RunningServer, changed: Path
) -> None:
    assert_same(server, "told", stock(changed / "sd21_base", base_of("sd21")), PLAIN)


def test_an_inpainting_checkpoint_has_more_channels_than_its_configuration(
    server: RunningServer, changed: Path
) -> None:
    pipe = stock(changed / "sd15_inpaint", "StableDiffusionInpaintPipeline")
    given = {"prompt": "a red fox", "num_inference_steps": 3, "image": noise_picture(1),
             "mask_image": half_mask(), "width": 64, "height": 64}  # fmt: skip
    asked = {name: given[name] for name in given if name not in ("width", "height")}
    assert_same(server, "sd15_inpaint.safetensors", pipe, given, asked)


@pytest.mark.parametrize(
    ("family", "layout", "checkpoint"),
    [*((family, layout, "single") for family, layout in VAES), ("sd15", "ldm", "folder")],
)
def test_a_vae_in_one_file_goes_with_checkpoints_of_either_form(
    server: RunningServer, model_dir: Path, family: str, layout: str, checkpoint: str
) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(model_dir / "vae" / family)
    pipe = stock(model_dir / "checkpoints" / family, base_of(family), vae=vae)
    name = "folder" if checkpoint == "folder" else f"{family}.safetensors"
    assert_same(server, name, pipe, PLAIN, vae=f"{family}-{layout}.safetensors")


def test_one_vae_file_is_scaled_as_each_checkpoint_needs_it(
    server: RunningServer, model_dir: Path
) -> None:
    for family in ("sd15", "sdxl"):
        vae = diffusers.AutoencoderKL.from_pretrained(model_dir / "vae" / "sd15")
        own = stock(model_dir / "checkpoints" / family, base_of(family)).vae
        vae.register_to_config(
            scaling_factor=own.config.scaling_factor, force_upcast=own.config.force_upcast
        )
        pipe = stock(model_dir / "checkpoints" / family, base_of(family), vae=vae)
        assert_same(server, f"{family}.safetensors", pipe, PLAIN, vae="sd15-ldm.safetensors")


@pytest.mark.parametrize(
    ("family", "layout", "checkpoint"),
    [*((family, layout, "single") for family, layout in CONTROLNETS), ("sd15", "ldm", "folder")],
)
def test_a_controlnet_in_one_file_goes_with_checkpoints_of_either_form(
    server: RunningServer, model_dir: Path, family: str, layout: str, checkpoint: str
) -> None:
    net = diffusers.ControlNetModel.from_pretrained(model_dir / "controlnet" / f"{family}-a")
    kind = base_of(family).replace("Pipeline", "ControlNetPipeline")
    pipe = stock(model_dir / "checkpoints" / family, kind, controlnet=net)
    name = "folder" if checkpoint == "folder" else f"{family}.safetensors"
    given = PLAIN | {"image": noise_picture(2)}
    asked = PLAIN | {"control_image": noise_picture(2)}
    assert_same(server, name, pipe, given, asked, control_model=f"{family}-{layout}.safetensors")


def test_a_lora_is_merged_into_a_single_file_as_into_its_folder(
    server: RunningServer, singles: Path
) -> None:
    lora = next((singles / "lora").glob("sd15-*-a.safetensors")).name
    asked = PLAIN | {"seed": 5}
    kind, loras = base_of("sd15"), [{"model": lora, "scale": 0.8}]
    one, two = (over_http(server, name, kind, asked, loras=loras)[0]
                for name in ("sd15.safetensors", "folder"))  # fmt: skip
    assert np.array_equal(pixels(one), pixels(two))
    without = over_http(server, "sd15.safetensors", kind, asked)[0]
    assert not np.array_equal(pixels(one), pixels(without))
    pipe = stock(singles / "checkpoints/folder", kind)
    assert np.array_equal(pixels(without), pixels(drawn(pipe, 5, **PLAIN))), "it stays merged"


def test_a_single_file_is_loaded_shown_and_unloaded_by_name(server: RunningServer) -> None:
    body = {"checkpoint": "sd21.safetensors"}
    assert "sd21.safetensors" in server.client.post("/load/checkpoint", json=body).json()
    held = {model["checkpoint"]: model["family"] for model in server.placement()[0]["models"]}
    assert held["sd21.safetensors"] == "sd21"
    assert "sd21.safetensors" not in server.client.post("/unload/checkpoint", json=body).json()


def test_configurations_are_fetched_once_without_weights_or_named_where_they_are_not_there(
    model_dir: Path, tmp_path: Path
) -> None:
    models, folders = tmp_path / "models", model_dir / "checkpoints"
    for family in ("sd15", "sdxl"):
        path = models / "checkpoints" / f"{family}.safetensors"
        single_file.write_checkpoint(folders / family, family, path)
    partial = single_file.copy_configs(folders / "sdxl", models / "configs" / "sdxl")
    missing = ["tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer.json",
               "tokenizer_2/merges.txt", "vae/config.json"]  # fmt: skip
    for name in missing:
        (partial / name).unlink()
    with local_hub.running() as hub:
        hub.repos["stable-diffusion-v1-5/stable-diffusion-v1-5"] = folders / "sd15"
        with running(tmp_path, MODEL_DIR=str(models), HF_ENDPOINT=hub.endpoint) as server:
            pipe = stock(folders / "sd15", base_of("sd15"))
            for _ in range(2):
                assert_same(server, "sd15.safetensors", pipe, PLAIN)
            assert hub.asked["API"] == 1
            assert hub.asked["GET tokenizer/vocab.json"] == 1
            assert not any(name.endswith(".safetensors") for name in hub.asked)
            body = {"checkpoint": "sdxl.safetensors", "parameters": PLAIN}
            answer = server.generate(body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_model")
    named = {word.strip(",") for word in answer.json()["detail"].split()}
    needed = {f"configs/sdxl/{name}" for name in missing if name != "tokenizer_2/tokenizer.json"}
    assert {word for word in named if word.startswith("configs/")} == needed
