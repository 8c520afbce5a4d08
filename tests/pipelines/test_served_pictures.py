"""The picture that HTTP returns is the one that stock Diffusers makes, to the last pixel.

Each of the twelve pipelines on each family that fits: the cells of the support table, which
`scripts/test --write-support-table tests/pipelines/test_served_pictures.py` writes anew.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.tools import support_table
from tests.tools.cells import CELLS, call_parameters, control_name, controlnet, parameters_for
from tests.tools.compare import drawn, over_http, pixels, stock
from tests.tools.server import RunningServer

SEED = 2**31 + 5
RESULTS: dict[tuple[str, str], bool] = {}


@pytest.mark.parametrize(("pipeline", "family"), CELLS)
def test_two_pictures_are_those_of_stock_diffusers(
    served: RunningServer, model_dir: Path, pipeline: str, family: str
) -> None:
    RESULTS[pipeline, family] = False  # until the last line
    given, more, asked = parameters_for(pipeline, family), {}, {}
    if "ControlNet" in pipeline:
        more["controlnet"] = controlnet(model_dir, family)
        asked["control_model"] = control_name(family)
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
