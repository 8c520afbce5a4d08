"""The demo over HTTP: is the picture what was asked for? Judged by image arithmetic."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.demo_model.judge import background_colour, object_colour
from scripts.demo_model.world import COLOUR_NAMES
from tests.tools.compare import half_mask, over_http, pixels, same
from tests.tools.server import RunningServer, running

PLAIN, IMAGE, INPAINT = (f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
HEART = "a large blue heart on a yellow background"
CIRCLE = "a large red circle on a white background"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(tmp_path_factory.mktemp("demo")) as server:
        yield server


def drawn(
    server: RunningServer, prompt: str, pipeline: str = PLAIN, seed: int = 1, **parameters: Any
) -> Image.Image:
    more = {k: parameters.pop(k) for k in ("vae", "loras", "control_model") if k in parameters}
    given = {"prompt": prompt, "seed": seed, **parameters}
    return over_http(server, "demo", pipeline, given, **more)[0]


def colours(picture: Image.Image) -> tuple[str, str | None]:
    """The background's and the object's."""
    thing = object_colour(picture)
    return COLOUR_NAMES[background_colour(picture)], None if thing is None else COLOUR_NAMES[thing]


def test_the_prompt_decides_the_picture(demo: RunningServer) -> None:
    assert colours(drawn(demo, HEART)) == ("yellow", "blue")
    assert colours(drawn(demo, CIRCLE)) == ("white", "red")


def test_the_same_seed_draws_the_same_picture(demo: RunningServer) -> None:
    first = drawn(demo, HEART, seed=3)
    assert same(first, drawn(demo, HEART, seed=3))
    assert not same(first, drawn(demo, HEART, seed=4))


def test_a_strong_image_to_image_follows_the_prompt(demo: RunningServer) -> None:
    start = drawn(demo, "a large blue square on a yellow background", seed=3)
    assert colours(drawn(demo, CIRCLE, IMAGE, image=start, strength=0.9)) == ("white", "red")


def test_inpainting_keeps_what_the_mask_leaves_out(demo: RunningServer) -> None:
    start = drawn(demo, "a small red circle on the left on a white background", seed=5)
    prompt = "a large blue square on the right on a white background"
    mask = half_mask(start.size)
    after = drawn(demo, prompt, INPAINT, image=start, mask_image=mask, strength=1.0)
    change = np.abs(pixels(after).astype(int) - pixels(start)).mean(-1)
    assert change[:, :56].mean() < 10 < change[:, 72:].mean()
    assert colours(after)[1] == "blue"


def test_the_outline_loras_scale_empties_the_shape(demo: RunningServer) -> None:
    dials = [[{"model": "demo-outline", "scale": scale}] for scale in (0.0, 1.0)]
    blues = [(pixels(drawn(demo, HEART, loras=dial))[..., 2] > 150).mean() for dial in dials]
    assert blues[1] < 0.6 * blues[0]


def test_the_paper_vae_changes_the_rendition(demo: RunningServer) -> None:
    plain, paper = drawn(demo, HEART), drawn(demo, HEART, vae="demo-paper")
    change = np.abs(pixels(plain).astype(int) - pixels(paper)).mean()
    assert 10 < change < 80
