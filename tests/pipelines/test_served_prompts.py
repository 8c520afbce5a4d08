"""Prompts over HTTP: weighted ones, long ones, clip_skip and lists, against stock Diffusers.

What is more than plain is read by Compel's own wrappers and handed to a stock call.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from PIL import Image

from tests.tools.cells import control_name, controlnet, expected, parameters_for, pipeline_name
from tests.tools.compare import asked, drawn, over_http, received, same, stock
from tests.tools.server import RunningServer

FAMILIES = ("sd15", "sd21", "sdxl")
WEIGHTED = "a (red)1.4 fox- in (deep (snow)+)0.7"
LONG = "a red fox in snow, " * 6
"""Over 77 tokens; the tiny tokenizer has one for each letter."""
TEXTS = [(WEIGHTED, "blurry"), (LONG, "blurry"), (WEIGHTED, LONG), ("a red fox", "(hens)1.5")]


def by_compel(pipe: Any, prompt: str, negative: str) -> dict[str, Any]:
    """The call's arguments in place of its texts."""
    is_xl = hasattr(pipe, "text_encoder_2")
    if is_xl:
        read = CompelForSDXL(pipe)(prompt, negative_prompt=negative)
        pooled = {
            "pooled_prompt_embeds": read.pooled_embeds,
            "negative_pooled_prompt_embeds": read.negative_pooled_embeds,
        }
    else:
        read, pooled = CompelForSD(pipe)(prompt, negative), {}
    embeds = {"prompt_embeds": read.embeds, "negative_prompt_embeds": read.negative_embeds}
    return embeds | pooled | {"prompt": None, "negative_prompt": None}


@pytest.mark.parametrize(("prompt", "negative"), TEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_and_long_prompts_equal_compel_and_stock(
    served: RunningServer, model_dir: Path, family: str, prompt: str, negative: str
) -> None:
    name = pipeline_name(family)
    given = parameters_for(name, family)
    texts = {"prompt": prompt, "negative_prompt": negative}
    [image] = over_http(served, family, name, given | texts | {"seed": 7})
    pipe = stock(model_dir / "checkpoints" / family, name)
    with torch.no_grad():
        embedded = by_compel(pipe, prompt, negative)
    assert same(image, drawn(pipe, 7, **given | embedded))
    plain = {"prompt": "a red fox in snow", "negative_prompt": "blurry"}
    assert not same(image, drawn(pipe, 7, **given | plain))


@pytest.mark.parametrize("task", ["Img2Img", "ControlNetInpaint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_prompts_equal_compel_and_stock_beside_pictures(
    served: RunningServer, model_dir: Path, family: str, task: str
) -> None:
    name = pipeline_name(family, task)
    given = parameters_for(name, family)
    parts, chosen = {}, {}
    if "ControlNet" in task:
        parts = {"controlnet": controlnet(model_dir, family)}
        chosen = {"control_model": control_name(family)}
    [image] = over_http(served, family, name, given | {"prompt": WEIGHTED, "seed": 7}, **chosen)
    pipe = stock(model_dir / "checkpoints" / family, name, **parts)
    with torch.no_grad():
        embedded = by_compel(pipe, WEIGHTED, given["negative_prompt"])
    assert same(image, drawn(pipe, 7, **given | embedded))


@pytest.mark.parametrize("prompt", ["a (red) fox", 'a "red" fox', ""])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_prompts_are_the_pipelines_own_to_the_letter(
    served: RunningServer, model_dir: Path, family: str, prompt: str
) -> None:
    name = pipeline_name(family)
    given = parameters_for(name, family) | {"prompt": prompt}
    [image] = over_http(served, family, name, given | {"seed": 7})
    assert same(image, expected(model_dir, family, name, given, 7))


def skipping(pipe: Any, prompt: str, clip_skip: int) -> torch.Tensor:
    """As Diffusers' `encode_prompt`, which fails here with Transformers from 5.6."""
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        states = pipe.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states
        inner = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        read: torch.Tensor = inner.final_layer_norm(states[-(clip_skip + 1)])
    return read


@pytest.mark.parametrize("task", ["", "Inpaint"])
@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_clip_skip_equals_what_diffusers_means_by_it(
    served: RunningServer, model_dir: Path, family: str, clip_skip: int, task: str
) -> None:
    name = pipeline_name(family, task)
    given = parameters_for(name, family)
    [image] = over_http(served, family, name, given | {"clip_skip": clip_skip, "seed": 7})
    pipe = stock(model_dir / "checkpoints" / family, name)
    read = {"prompt": None, "prompt_embeds": skipping(pipe, given["prompt"], clip_skip)}
    assert same(image, drawn(pipe, 7, **given | read))
    assert not same(image, drawn(pipe, 7, **given))


@pytest.mark.parametrize("family", ["sdxl", "sdxl_turbo", "sdxl_refiner"])
def test_clip_skip_equals_stock_on_sdxl(
    served: RunningServer, model_dir: Path, family: str
) -> None:
    name = pipeline_name(family, "Img2Img")
    plain = parameters_for(name, family)
    given = plain | {"clip_skip": 1}
    [image] = over_http(served, family, name, given | {"seed": 7})
    assert same(image, expected(model_dir, family, name, given, 7))
    # With guidance 0 and a single step the text can be too weak to be seen; not elsewhere.
    if family != "sdxl_turbo":
        assert not same(image, expected(model_dir, family, name, plain, 7))


def test_more_layers_than_there_are_cannot_be_skipped(served: RunningServer) -> None:
    for family in FAMILIES:
        name = pipeline_name(family)
        answer = asked(served, family, name, parameters_for(name, family) | {"clip_skip": 12})
        assert answer.status_code == 422, answer.text
        assert answer.json()["field"] == "parameters.clip_skip"
        assert "0 to 2" in answer.json()["detail"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_of_prompts_makes_pictures_of_each_in_order(
    served: RunningServer, model_dir: Path, family: str
) -> None:
    name = pipeline_name(family)
    given = parameters_for(name, family)
    prompts, negatives = ["a red fox", WEIGHTED, "a hen"], ["blurry", "", "feathers"]
    several = {"prompt": prompts, "negative_prompt": negatives, "num_images_per_prompt": 2}
    answer = asked(served, family, name, given | several | {"seed": 40})
    images = received(answer)
    assert answer.json()["meta"]["seeds"] == [40, 41, 42, 43, 44, 45]
    pipe = stock(model_dir / "checkpoints" / family, name)
    for index, image in enumerate(images):
        texts: dict[str, Any] = {
            "prompt": prompts[index // 2],
            "negative_prompt": negatives[index // 2],
        }
        if texts["prompt"] is WEIGHTED:
            with torch.no_grad():
                texts = by_compel(pipe, **{"prompt": WEIGHTED, "negative": ""})
        assert same(image, drawn(pipe, 40 + index, **given | texts)), index


def test_a_prompt_that_cannot_be_read_is_refused_by_its_field(served: RunningServer) -> None:
    given = parameters_for("StableDiffusionPipeline", "sd15") | {"negative_prompt": "hen.swap(fox)"}
    answer = asked(served, "sd15", "StableDiffusionPipeline", given)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == "parameters.negative_prompt"


def test_a_list_of_seeds_gives_each_picture_its_own(served: RunningServer, model_dir: Path) -> None:
    name, seeds = "StableDiffusionPipeline", [5, 2**63 - 1, 5, 0]
    given = parameters_for(name, "sd15")
    several = {"prompt": ["a fox", "a hen"], "num_images_per_prompt": 2, "seed": seeds}
    images = over_http(served, "sd15", name, given | several)
    prompts = ["a fox", "a fox", "a hen", "a hen"]
    for image, prompt, seed in zip(images, prompts, seeds, strict=True):
        right: Image.Image = expected(model_dir, "sd15", name, given | {"prompt": prompt}, seed)
        assert same(image, right)
