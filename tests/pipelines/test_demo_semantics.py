"""The demo over HTTP: is the picture what was asked for? Judged by image arithmetic.

Each threshold stands between two measured ranges, given beside it: of what is asked for here, and
of what it must be told from. They were measured on seeds 1 to 6, relations and the LoRA on 1 to 4.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from scripts.demo_model.judge import (
    Mask,
    background_colour,
    filled_share,
    object_colour,
    patch,
    shape_of,
    tint,
)
from scripts.demo_model.render import large_shape
from scripts.demo_model.world import COLOUR_NAMES, NATIVE_SIZE, SHAPES
from tests.tools.compare import half_mask, over_http, pixels, same
from tests.tools.server import RunningServer, running

PLAIN, IMAGE, INPAINT, CONTROLNET = (
    f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint", "ControlNet")
)
HEART = "a large blue heart on a yellow background"
MIDDLE = NATIVE_SIZE // 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(tmp_path_factory.mktemp("demo")) as server:
        yield server


@pytest.fixture(scope="module")
def heart(demo: RunningServer) -> Image.Image:
    return drawn(demo, HEART)


def drawn(
    server: RunningServer, prompt: str, pipeline: str = PLAIN, seed: int = 1, **parameters: Any
) -> Image.Image:
    more = {k: parameters.pop(k) for k in ("vae", "loras", "control_model") if k in parameters}
    given = {"prompt": prompt, "seed": seed, **parameters}
    return over_http(server, "demo", pipeline, given, **more)[0]


def seen(picture: Image.Image) -> tuple[str | None, str, str]:
    """The object's shape and colour, and the background's."""
    thing = object_colour(picture)
    assert thing is not None
    return shape(silhouette(picture)), COLOUR_NAMES[thing], ground(picture)


def ground(picture: Image.Image) -> str:
    return COLOUR_NAMES[background_colour(picture)]


def shape(mask: Mask) -> str | None:
    index = shape_of(mask)
    return None if index is None else SHAPES[index]


def silhouette(picture: Image.Image) -> Mask:
    """Where the picture is not background."""
    return patch(picture, *(name for name in COLOUR_NAMES if name != ground(picture)))


def overlap(some: Mask, other: Mask) -> float:
    return float((some & other).sum() / (some | other).sum())


def change(some: Image.Image, other: Image.Image) -> np.ndarray[Any, Any]:
    """By how much each pixel differs, 0 to 255: [H, W]."""
    return np.abs(pixels(some).astype(int) - pixels(other)).mean(-1)


# Prompts and seeds.


@pytest.mark.parametrize(
    "wanted", [("heart", "blue", "yellow"), ("circle", "red", "white"), ("star", "pink", "black")]
)
def test_the_prompt_decides_the_picture(demo: RunningServer, wanted: tuple[str, ...]) -> None:
    form, colour, backdrop = wanted
    assert seen(drawn(demo, f"a large {colour} {form} on a {backdrop} background")) == wanted


@pytest.mark.parametrize(
    ("words", "down", "right"),
    [("left of", 0, -1), ("right of", 0, 1), ("above", -1, 0), ("below", 1, 0)],
)
def test_the_prompt_decides_which_of_two_objects_is_where(
    demo: RunningServer, words: str, down: int, right: int
) -> None:
    picture = drawn(demo, f"a red circle {words} a blue square on a yellow background")
    circle, square = patch(picture, "red"), patch(picture, "blue")
    assert (shape(circle), shape(square)) == ("circle", "square")
    apart = np.subtract(ndimage.center_of_mass(circle), ndimage.center_of_mass(square))
    # 50 to 65 pixels the way it was asked for, up to 12 across.
    assert apart @ (down, right) > 30
    assert abs(apart @ (right, down)) < 30


def test_the_same_seed_draws_the_same_picture(demo: RunningServer, heart: Image.Image) -> None:
    assert same(heart, drawn(demo, HEART, seed=1))
    assert not same(heart, drawn(demo, HEART, seed=2))


# Pictures to begin with.


def test_the_strength_decides_between_the_picture_and_the_prompt(demo: RunningServer) -> None:
    start = drawn(demo, "a large blue square on the left on a yellow background")
    prompt = "a large red circle on the right on a white background"
    near, far = (drawn(demo, prompt, IMAGE, image=start, strength=s) for s in (0.3, 0.9))
    # Of the silhouettes' union, 0.82 to 0.92 is common to both at 0.3, and 0.25 to 0.32 at 0.9.
    assert overlap(silhouette(start), silhouette(near)) > 0.6
    assert ground(near) == "yellow"
    assert overlap(silhouette(start), silhouette(far)) < 0.5
    assert seen(far) == ("circle", "red", "white")


@pytest.mark.parametrize(("form", "colour"), [("square", "blue"), ("heart", "purple")])
def test_inpainting_draws_the_prompt_behind_the_mask_and_nothing_elsewhere(
    demo: RunningServer, form: str, colour: str
) -> None:
    start = drawn(demo, "a small red circle on the left on a white background")
    prompt = f"a small red circle left of a {colour} {form} on a white background"
    mask = half_mask(start.size)
    after = drawn(demo, prompt, INPAINT, image=start, mask_image=mask, strength=1.0)
    changed, new = change(start, after), patch(after, colour)
    # By 0.5 to 1.1 left of the mask's blurred rim, as the decoder looks around; 12 to 29 behind it.
    assert changed[:, : MIDDLE - 8].mean() < 3 < changed[:, MIDDLE:].mean()
    assert not new[:, : MIDDLE - 8].any()
    assert shape(new) == form
    assert overlap(patch(start, "red"), patch(after, "red")) > 0.9  # 0.98 to 0.99


# Companions.


@pytest.mark.parametrize("form", ["star", "ring", "cross"])
def test_the_controlnets_edges_decide_the_shape(demo: RunningServer, form: str) -> None:
    inside, contour = large_shape(form)
    edges = Image.fromarray(np.uint8(contour * 255)).convert("RGB")
    picture = drawn(demo, HEART, CONTROLNET, control_image=edges, control_model="demo-edges")
    assert seen(picture) == (form, "blue", "yellow")
    # 0.91 to 1.00 in common, with the edges of all eight shapes; two shapes have 0.84 at most.
    assert overlap(silhouette(picture), inside.numpy()) > 0.88


def test_the_outline_loras_scale_is_a_dial_from_filled_to_outlined(demo: RunningServer) -> None:
    pictures = [
        drawn(demo, HEART, loras=[{"model": "demo-outline", "scale": scale}])
        for scale in (0.0, 0.5, 1.0)
    ]
    hearts = [patch(picture, "blue", among=("blue", "yellow")) for picture in pictures]
    assert [shape(ndimage.binary_fill_holes(mask)) for mask in hearts] == ["heart"] * 3
    tints = [tint(picture, "blue", "yellow") for picture in pictures]
    # Inside: 0.99 to 1.00 of the way from yellow to blue, 0.23 to 0.58, and 0.01 to 0.02.
    assert tints[0] > 0.8 > 0.7 > tints[1] > 0.12 > tints[2]
    # 1.00, and 0.25 to 0.32 of the heart is blue.
    assert filled_share(hearts[0]) > 0.8
    assert filled_share(hearts[2]) < 0.5


def test_the_paper_vae_changes_the_rendition_and_not_the_layout(
    demo: RunningServer, heart: Image.Image
) -> None:
    paper = drawn(demo, HEART, vae="demo-paper")
    assert seen(paper) == seen(heart)
    # 0.92 to 0.94 in common; hearts of different seeds have 0.28 to 0.90.
    assert overlap(silhouette(heart), silhouette(paper)) > 0.91
    assert change(heart, paper).mean() > 12  # 24 to 25, all over the picture


def test_a_negative_prompt_keeps_a_colour_away(demo: RunningServer) -> None:
    prompt, seeds = "a large circle on a white background", (1, 3, 4)
    free = [seen(drawn(demo, prompt, seed=seed)) for seed in seeds]
    kept = [seen(drawn(demo, prompt, seed=seed, negative_prompt="orange")) for seed in seeds]
    # Of eight seeds seven were orange; six still were without "red", and one without "orange".
    assert [colour for _, colour, _ in free].count("orange") >= 2
    assert [colour for _, colour, _ in kept].count("orange") <= 1
    assert [(form, backdrop) for form, _, backdrop in kept] == [("circle", "white")] * 3
