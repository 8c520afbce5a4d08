"""SDXL's own parameters, Turbo's defaults, and SD2.1's configured scheduler, against stock."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.tools.cells import controlnet, expected, parameters_for, pipeline_name
from tests.tools.compare import components, over_http, same
from tests.tools.server import RunningServer

DETAILS: dict[str, dict[str, Any]] = {
    "prompt_2": {"prompt_2": "a blue hen"},
    "negative_prompt_2": {"negative_prompt_2": "a green frog"},
    "both": {"prompt_2": "a blue hen", "negative_prompt_2": "a green frog"},
    "original_size": {"original_size": [512, 768]},
    "target_size": {"target_size": [1024, 512]},
    "crops": {"crops_coords_top_left": [64, 32]},
    "negative_sizes": {
        "negative_original_size": [32, 32],
        "negative_crops_coords_top_left": [8, 8],
        "negative_target_size": [512, 512],
    },
    "guidance_rescale": {"guidance_rescale": 0.7},
    "denoising_end": {"denoising_end": 0.5},
    "sigmas": {"sigmas": [10.0, 4.0, 1.0, 0.2]},
}


def as_call(given: dict[str, Any]) -> dict[str, Any]:
    """Sizes are tuples in the pipeline's call."""
    pairs = {name for name in given if name.endswith(("_size", "_left"))}
    return {name: tuple(v) if name in pairs else v for name, v in given.items()}


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("task", ["", "Img2Img"])
def test_a_detail_of_sdxl_equals_stock(
    served: RunningServer, model_dir: Path, task: str, detail: str
) -> None:
    name = pipeline_name("sdxl", task)
    plain = parameters_for(name, "sdxl") | {"num_inference_steps": 4}
    given = plain | DETAILS[detail]
    if task and detail == "denoising_end":
        given["denoising_end"] = 0.8
    [image] = over_http(served, "sdxl", name, given | {"seed": 7})
    assert same(image, expected(model_dir, "sdxl", name, as_call(given), 7))
    assert not same(image, expected(model_dir, "sdxl", name, plain, 7))


def test_denoising_start_equals_stock(served: RunningServer, model_dir: Path) -> None:
    name = "StableDiffusionXLImg2ImgPipeline"
    given = parameters_for(name, "sdxl") | {"denoising_start": 0.4, "num_inference_steps": 5}
    del given["strength"]
    [image] = over_http(served, "sdxl", name, given | {"seed": 7})
    assert same(image, expected(model_dir, "sdxl", name, given, 7))
    later = given | {"denoising_start": 0.8}
    assert not same(image, expected(model_dir, "sdxl", name, later, 7))


@pytest.mark.parametrize("score", ["aesthetic_score", "negative_aesthetic_score"])
def test_an_aesthetic_score_equals_stock(
    served: RunningServer, model_dir: Path, score: str
) -> None:
    name = "StableDiffusionXLImg2ImgPipeline"
    plain = parameters_for(name, "sdxl_refiner")
    given = plain | {score: 9.5}
    [image] = over_http(served, "sdxl_refiner", name, given | {"seed": 7})
    assert same(image, expected(model_dir, "sdxl_refiner", name, given, 7))
    assert not same(image, expected(model_dir, "sdxl_refiner", name, plain, 7))


@pytest.mark.parametrize("task", ["", "Inpaint", "ControlNet"])
def test_guidance_rescale_and_eta_equal_stock_on_sd(
    served: RunningServer, model_dir: Path, task: str
) -> None:
    # Only text to image has a guidance_rescale.
    more = {"eta": 0.8} if task else {"eta": 0.8, "guidance_rescale": 0.6}
    name = pipeline_name("sd21", task)
    plain = parameters_for(name, "sd21")
    parts = {"controlnet": controlnet(model_dir, "sd21")} if "ControlNet" in task else {}
    chosen = {"control_model": "sd21-a"} if parts else {}
    [image] = over_http(served, "sd21", name, plain | more | {"seed": 7}, **chosen)
    assert same(image, expected(model_dir, "sd21", name, plain | more, 7, **parts))
    assert not same(image, expected(model_dir, "sd21", name, plain, 7, **parts))


@pytest.mark.parametrize("task", ["", "Img2Img"])
def test_a_turbo_takes_one_step_without_guidance_by_itself(
    served: RunningServer, model_dir: Path, task: str
) -> None:
    name = pipeline_name("sdxl", task)
    left_out = parameters_for(name, "sdxl_turbo")
    one_step = {name: left_out.pop(name) for name in ("num_inference_steps", "guidance_scale")}
    assert one_step == {"num_inference_steps": 1, "guidance_scale": 0.0}
    [image] = over_http(served, "sdxl_turbo", name, left_out | {"seed": 7})
    given = left_out | one_step
    assert same(image, expected(model_dir, "sdxl_turbo", name, given, 7))
    two_steps = given | {"num_inference_steps": 2}
    assert not same(image, expected(model_dir, "sdxl_turbo", name, two_steps, 7))
    [asked_for] = over_http(served, "sdxl_turbo", name, two_steps | {"seed": 7})
    assert same(asked_for, expected(model_dir, "sdxl_turbo", name, two_steps, 7))


@pytest.fixture(scope="module")
def zero_snr(model_dir: Path) -> str:
    """An SD2.1 whose scheduler starts from pure noise."""
    folder = model_dir / "checkpoints" / "sd21_zero_snr"
    shutil.copytree(model_dir / "checkpoints" / "sd21", folder, dirs_exist_ok=True)
    path = folder / "scheduler" / "scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder.name


@pytest.mark.parametrize("scheduler", [None, "EulerDiscreteScheduler"])
def test_sd21_predicts_velocity_from_pure_noise_as_its_scheduler_says(
    served: RunningServer, model_dir: Path, zero_snr: str, scheduler: str | None
) -> None:
    name = "StableDiffusionPipeline"
    given = parameters_for(name, "sd21") | {"guidance_rescale": 0.7}
    chosen = {"scheduler": scheduler} if scheduler else {}
    [image] = over_http(served, zero_snr, name, given | {"seed": 7}, **chosen)
    own = components(model_dir / "checkpoints" / zero_snr)["scheduler"]
    kind = getattr(diffusers, scheduler) if scheduler else type(own)
    right = kind.from_config(own.config)
    assert right.config.prediction_type == "v_prediction"
    assert right.config.rescale_betas_zero_snr
    assert same(image, expected(model_dir, zero_snr, name, given, 7, scheduler=right))
    for setting in ({"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": False}):
        wrong = kind.from_config(own.config, **setting)
        assert not same(image, expected(model_dir, zero_snr, name, given, 7, scheduler=wrong))
