"""Requests that cannot be: each answer names the field and the remedy, and nothing is left behind.

After each of them the same checkpoint draws the picture that stock Diffusers draws.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tools.cells import expected, parameters_for, pipeline_name
from tests.tools.compare import asked, noise_picture, over_http, same
from tests.tools.server import RunningServer

SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
CONTROL = "StableDiffusionControlNetPipeline"
LORA = "sd15-diffusers-a.safetensors"
REFINER = {"refiner_model": "sdxl_refiner"}

Case = tuple[str, str, Mapping[str, Any], Mapping[str, Any], str, str]
# Checkpoint, pipeline, parameters, the rest of the request, the field, what the answer says.
CASES: dict[str, Case] = {
    "a ControlNet class without a ControlNet": (
        *("sd15", CONTROL, {}, {}),
        *("control_model", "needs a ControlNet"),
    ),
    "a ControlNet where none is taken": (
        *("sd15", SD, {}, {"control_model": "sd15-a"}),
        *("control_model", "takes no ControlNet"),
    ),
    "two ControlNets and one picture": (
        *("sd15", CONTROL, {}, {"control_model": ["sd15-a", "sd15-b"]}),
        *("parameters.control_image", "Expected 2 pictures"),
    ),
    "two scales for one ControlNet": (
        "sd15",
        CONTROL,
        {"controlnet_conditioning_scale": [0.5, 0.5]},
        {"control_model": "sd15-a"},
        "parameters.controlnet_conditioning_scale",
        "Expected one number",
    ),
    "a ControlNet that ends before it begins": (
        "sd15",
        CONTROL,
        {"control_guidance_start": 0.8, "control_guidance_end": 0.2},
        {"control_model": "sd15-a"},
        "parameters.control_guidance_start",
        "Expected less than",
    ),
    "a ControlNet of another family": (
        *("sd15", CONTROL, {}, {"control_model": "sdxl-a"}),
        *("control_model", "'sdxl-a' (family sdxl)"),
    ),
    "a LoRA of another family": (
        *("sd15", SD, {}, {"loras": [{"model": "sdxl-kohya-a.safetensors"}]}),
        *("loras", "'sdxl-kohya-a.safetensors' (family sdxl)"),
    ),
    "a LoRA that fits beside one that does not": (
        "sd21",
        SD,
        {},
        {"loras": [{"model": "sd21-kohya-a.safetensors"}, {"model": LORA}]},
        "loras",
        f"'{LORA}' (family sd15)",
    ),
    "a LoRA that is not there": (
        *("sd15", SD, {}, {"loras": [{"model": "none.safetensors"}]}),
        *("loras", "there is no"),
    ),
    "a LoRA with an endless scale": (
        *("sd15", SD, {}, {"loras": [{"model": LORA, "scale": 1e9}]}),
        *("loras[0].scale", "100"),
    ),
    "a VAE of another family": ("sd15", SD, {}, {"vae": "sdxl"}, "vae", "'sdxl'"),
    "a ControlNet as a VAE": (
        "sd15",
        SD,
        {},
        {"vae": "../controlnet/sd15-a"},
        "vae",
        "there is no",
    ),
    "a strength of 2": (
        *("sd15", "StableDiffusionImg2ImgPipeline", {"strength": 2}, {}),
        *("parameters.strength", "<= 1"),
    ),
    "a strength that leaves no step": (
        "sd15",
        "StableDiffusionImg2ImgPipeline",
        {"strength": 0.1, "num_inference_steps": 3},
        {},
        "parameters.strength",
        "at least 1",
    ),
    "an unknown A1111 name": (
        *("sd15", SD, {}, {"a1111_scheduler": "DPM++ 4M Karras"}),
        *("a1111_scheduler", "DPM++ 2M Karras"),
    ),
    "an unknown scheduler": (
        *("sd15", SD, {}, {"scheduler": "EulerScheduler"}),
        *("scheduler", "EulerDiscreteScheduler"),
    ),
    "a scheduler that does not fit": (
        *("sd15", SD, {}, {"scheduler": "FlowMatchEulerDiscreteScheduler"}),
        *("scheduler", "DDIMScheduler"),
    ),
    "two schedulers": (
        *("sd15", SD, {}, {"scheduler": "DDIMScheduler", "a1111_scheduler": "Euler"}),
        *("a1111_scheduler", "name one"),
    ),
    "a refiner that is a base": (
        *("sdxl", XL, {}, {"refiner_model": "sdxl_turbo"}),
        *("refiner_model", "an sdxl checkpoint takes an sdxl_refiner"),
    ),
    "a refiner for SD1.5": ("sd15", SD, {}, REFINER, "refiner_model", "an sdxl checkpoint"),
    "a refiner's parameters without a refiner": (
        *("sdxl", XL, {}, {"refiner_parameters": {"strength": 0.5}}),
        *("refiner_parameters", "without a refiner_model"),
    ),
    "a refiner's strength of 2": (
        *("sdxl", XL, {}, REFINER | {"refiner_parameters": {"strength": 2}}),
        *("refiner_parameters.strength", "<= 1"),
    ),
    "a refiner without a step to make": (
        *("sdxl", XL, {}, REFINER | {"refiner_parameters": {"strength": 0.1}}),
        *("refiner_parameters.strength", "at least 1"),
    ),
    "a refiner's own list of prompts": (
        *("sdxl", XL, {}, REFINER | {"refiner_parameters": {"prompt": ["a", "b"]}}),
        *("refiner_parameters.prompt", "one text"),
    ),
    "an SDXL parameter on SD1.5": (
        *("sd15", SD, {"original_size": [64, 64]}, {}),
        *("parameters.original_size", "it takes"),
    ),
    "a second prompt on SD1.5": (
        *("sd15", SD, {"prompt_2": "a hen"}, {}),
        *("parameters.prompt_2", "it takes"),
    ),
    "an SDXL pipeline on SD1.5": ("sd15", XL, {}, {}, "pipeline", "this pipeline takes sdxl"),
    "an SD pipeline on SDXL": ("sdxl", SD, {}, {}, "pipeline", "sd15 or sd21"),
    "no picture to start from": (
        *("sd15", "StableDiffusionImg2ImgPipeline", {"image": None}, {}),
        *("parameters.image", "needs `image`"),
    ),
    "a mask of another size": (
        "sd15",
        "StableDiffusionInpaintPipeline",
        {"mask_image": noise_picture(3, (32, 32))},
        {},
        "parameters.mask_image",
        "as large as image",
    ),
    "a safety checker that is not there": (
        *("sd15", SD, {}, {"safety_checker": True}),
        *("safety_checker", "MODEL_DIR/safety_checker"),
    ),
    "more layers skipped than there are": (
        *("sd15", SD, {"clip_skip": 12}, {}),
        *("parameters.clip_skip", "0 to 2"),
    ),
    "crops that are no pair": (
        *("sdxl", XL, {"crops_coords_top_left": [1, 2, 3]}, {}),
        *("parameters.crops_coords_top_left", "2"),
    ),
    "a denoising that ends before it begins": (
        "sdxl",
        "StableDiffusionXLImg2ImgPipeline",
        {"denoising_start": 0.8, "denoising_end": 0.4},
        {},
        "parameters.denoising_start",
        "Expected less than",
    ),
    "timesteps that the scheduler does not take": (
        *("sd15", SD, {"timesteps": [900, 500, 100]}, {}),
        *("parameters.timesteps", "custom timestep schedules"),
    ),
    "a width of 60": ("sd15", SD, {"width": 60}, {}, "parameters.width", "multiple of 8"),
}


@pytest.fixture(scope="module")
def right(model_dir: Path) -> dict[str, Image.Image]:
    """Stock's picture of each checkpoint that a bad request names."""
    return {
        family: expected(
            model_dir, family, name := pipeline_name(family), parameters_for(name, family), 7
        )
        for family in ("sd15", "sd21", "sdxl")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_bad_request_is_refused_by_its_field_and_leaves_nothing_behind(
    served: RunningServer, right: dict[str, Image.Image], case: str
) -> None:
    family, pipeline, wrong, more, field, remedy = CASES[case]
    before = [(worker["pid"], worker["restarts"]) for worker in served.placement()]
    given = parameters_for(pipeline, family) | wrong
    sent = {name: value for name, value in given.items() if value is not None}
    answer = asked(served, family, pipeline, sent, **more)
    problem = answer.json()
    assert 400 <= answer.status_code < 500, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem.get("field") == field, problem
    assert remedy in problem["detail"], problem
    assert "Traceback" not in problem["detail"]
    name = pipeline_name(family)
    [after] = over_http(served, family, name, parameters_for(name, family) | {"seed": 7})
    assert same(after, right[family])
    assert [(worker["pid"], worker["restarts"]) for worker in served.placement()] == before
