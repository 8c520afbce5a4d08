"""Requests for each of the twelve pipelines on each family, in small, and their stock calls."""

from pathlib import Path
from typing import Any

import diffusers

from tests.tools.compare import drawn, half_mask, noise_picture, stock

SD = ("sd15", "sd21")
SDXL = ("sdxl", "sdxl_turbo")
TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
CELLS = [
    (f"{prefix}{task}Pipeline", family)
    for prefix, families in (("StableDiffusion", SD), ("StableDiffusionXL", SDXL))
    for task in TASKS
    for family in families
]


def pipeline_name(family: str, task: str = "") -> str:
    """`StableDiffusionXLControlNetPipeline` for sdxl and ControlNet, and so on."""
    return f"StableDiffusion{'XL' if 'xl' in family else ''}{task}Pipeline"


def parameters_for(pipeline: str, family: str) -> dict[str, Any]:
    """As a caller sends them; pictures as Pillow pictures."""
    given: dict[str, Any] = {
        "prompt": "a red fox in the snow",
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "negative_prompt": "blurry",
    }
    if family == "sdxl_turbo":
        given |= {"num_inference_steps": 1, "guidance_scale": 0.0}
        del given["negative_prompt"]
    if "Img2Img" in pipeline or "Inpaint" in pipeline:
        # With one step, only full strength leaves a step to make.
        strength = 1.0 if family == "sdxl_turbo" else 0.7
        given |= {"image": noise_picture(1), "strength": strength}
    else:
        given |= {"width": 64, "height": 64}
    if "Inpaint" in pipeline:
        given["mask_image"] = half_mask()
    if "ControlNet" in pipeline:
        given["control_image"] = noise_picture(2)
    return given


def call_parameters(pipeline: str, given: dict[str, Any]) -> dict[str, Any]:
    """The same for the pipeline's own call: text to image has its control picture as `image`."""
    if pipeline.endswith("ControlNetPipeline"):
        return {("image" if k == "control_image" else k): v for k, v in given.items()}
    return given


def control_name(family: str, letter: str = "a") -> str:
    """A ControlNet's name in `model_dir`."""
    return f"{family.removesuffix('_turbo')}-{letter}"


def controlnet(model_dir: Path, family: str, letter: str = "a") -> Any:
    folder = model_dir / "controlnet" / control_name(family, letter)
    return diffusers.ControlNetModel.from_pretrained(folder)


def expected(
    model_dir: Path, family: str, pipeline: str, given: dict[str, Any], seed: int, **parts: Any
) -> Any:
    """The picture of one stock call; `parts` take the place of the checkpoint's own."""
    pipe = stock(model_dir / "checkpoints" / family, pipeline, **parts)
    return drawn(pipe, seed, **call_parameters(pipeline, given))
