"""The picture that HTTP returns is the one that stock Diffusers makes, to the last pixel.

Each of the twelve pipelines on each family that fits: the cells of the support table, which
`scripts/test --write-support-table tests/pipelines/test_served_pictures.py` writes anew.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from tests.tools import support_table
from tests.tools.compare import drawn, half_mask, noise_picture, over_http, pixels, stock
from tests.tools.server import RunningServer

SD = ("sd15", "sd21")
SDXL = ("sdxl", "sdxl_turbo")
TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
CELLS = [
    (f"{prefix}{task}Pipeline", family)
    for prefix, families in (("StableDiffusion", SD), ("StableDiffusionXL", SDXL))
    for task in TASKS
    for family in families
]
SEED = 2**31 + 5
RESULTS: dict[tuple[str, str], bool] = {}


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


def controlnet(model_dir: Path, family: str, letter: str = "a") -> Any:
    name = f"{family.removesuffix('_turbo')}-{letter}"
    return diffusers.ControlNetModel.from_pretrained(model_dir / "controlnet" / name)


@pytest.mark.parametrize(("pipeline", "family"), CELLS)
def test_two_pictures_are_those_of_stock_diffusers(
    served: RunningServer, model_dir: Path, pipeline: str, family: str
) -> None:
    RESULTS[pipeline, family] = False  # until the last line
    given, more, asked = parameters_for(pipeline, family), {}, {}
    if "ControlNet" in pipeline:
        more["controlnet"] = controlnet(model_dir, family)
        asked["control_model"] = f"{family.removesuffix('_turbo')}-a"
    images = over_http(
        served, family, pipeline, given | {"seed": SEED, "num_images_per_prompt": 2}, **asked
    )
    assert len(images) == 2
    pipe = stock(model_dir / "checkpoints" / family, pipeline, **more)
    for index, image in enumerate(images):
        expected = drawn(pipe, SEED + index, **call_parameters(pipeline, given))
        assert np.array_equal(pixels(image), pixels(expected)), f"picture {index} differs"
    assert not np.array_equal(pixels(images[0]), pixels(images[1])), "the seed has no effect"
    RESULTS[pipeline, family] = True


def test_the_readme_shows_these_results(request: pytest.FixtureRequest) -> None:
    if set(RESULTS) != set(CELLS):
        pytest.skip("not every cell of the table was run")
    table = support_table.render(RESULTS)
    if request.config.getoption("--write-support-table"):
        support_table.write(table)
    assert support_table.shown() == table


@pytest.mark.parametrize(
    "pipeline", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"]
)
def test_the_refiner_serves_pictures_of_its_own(
    served: RunningServer, model_dir: Path, pipeline: str
) -> None:
    given = parameters_for(pipeline, "sdxl_refiner") | {"aesthetic_score": 7.0}
    image = over_http(served, "sdxl_refiner", pipeline, given | {"seed": 3})[0]
    pipe = stock(model_dir / "checkpoints" / "sdxl_refiner", pipeline)
    assert np.array_equal(pixels(image), pixels(drawn(pipe, 3, **given)))
