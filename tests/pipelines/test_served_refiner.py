"""A base and its refiner in one request, against two stock pipelines one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from tests.tools.cells import parameters_for, pipeline_name
from tests.tools.compare import drawn, over_http, same, stock
from tests.tools.server import RunningServer

REFINING = "StableDiffusionXLImg2ImgPipeline"
NOT_REFINED = ("width", "height", "image", "mask_image", "strength", "denoising_end")


def refined(
    model_dir: Path,
    family: str,
    given: dict[str, Any],
    own: dict[str, Any],
    seed: int,
    **parts: Any,
) -> Image.Image:
    """The base, then the refiner with a new generator of the same seed."""
    name = name_of(given, family)
    base = stock(model_dir / "checkpoints" / family, name, **parts)
    refiner = stock(model_dir / "checkpoints" / "sdxl_refiner", REFINING, **parts)
    taken = {key: value for key, value in given.items() if key not in NOT_REFINED} | own
    if "denoising_end" in given:
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            picture = base(**given, generator=generator, output_type="latent").images
        taken["denoising_start"] = given["denoising_end"]
    else:
        picture = drawn(base, seed, **given)
    return drawn(refiner, seed, image=picture, **taken)


def name_of(given: dict[str, Any], family: str) -> str:
    task = "Inpaint" if "mask_image" in given else "Img2Img" if "image" in given else ""
    return pipeline_name(family, task)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "halfway": ({"denoising_end": 0.5}, {}),
    "late": ({"denoising_end": 0.8, "num_inference_steps": 5}, {"aesthetic_score": 4.0}),
    "with another text": ({"denoising_end": 0.5}, {"prompt": "a blue hen", "guidance_scale": 2.0}),
    "finished": ({}, {}),
    "finished, by a strength": ({}, {"strength": 0.7, "negative_aesthetic_score": 1.0}),
    "finished, in other steps": ({}, {"num_inference_steps": 6, "negative_prompt": "a bird"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_base_and_its_refiner_equal_two_stock_calls(
    served: RunningServer, model_dir: Path, case: str
) -> None:
    base, own = CASES[case]
    name = "StableDiffusionXLPipeline"
    given = parameters_for(name, "sdxl") | {"num_inference_steps": 4} | base
    chosen = {"refiner_model": "sdxl_refiner", "refiner_parameters": own}
    images = over_http(
        served, "sdxl", name, given | {"seed": 3, "num_images_per_prompt": 2}, **chosen
    )
    for seed, image in enumerate(images, 3):
        assert same(image, refined(model_dir, "sdxl", given, own, seed))
    assert not same(*images)
    if own:
        assert not same(images[0], refined(model_dir, "sdxl", given, {}, 3))
    unrefined = given if "denoising_end" not in base else parameters_for(name, "sdxl")
    assert not same(images[0], over_http(served, "sdxl", name, unrefined | {"seed": 3})[0])


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("end", [None, 0.8])
def test_a_picture_made_from_a_picture_is_refined(
    served: RunningServer, model_dir: Path, task: str, end: float | None
) -> None:
    name = pipeline_name("sdxl", task)
    given = parameters_for(name, "sdxl") | {"num_inference_steps": 5}
    given |= {} if end is None else {"denoising_end": end}
    chosen = {"refiner_model": "sdxl_refiner"}
    [image] = over_http(served, "sdxl", name, given | {"seed": 3}, **chosen)
    assert same(image, refined(model_dir, "sdxl", given, {}, 3))


def test_the_scheduler_asked_for_is_the_refiners_too(
    served: RunningServer, model_dir: Path
) -> None:
    name = "StableDiffusionXLPipeline"
    given = parameters_for(name, "sdxl") | {"denoising_end": 0.5, "num_inference_steps": 4}
    chosen = {"refiner_model": "sdxl_refiner", "scheduler": "DDIMScheduler"}
    [image] = over_http(served, "sdxl", name, given | {"seed": 3}, **chosen)
    own = stock(model_dir / "checkpoints" / "sdxl", name).scheduler
    assert isinstance(own, EulerDiscreteScheduler)
    scheduler = DDIMScheduler.from_config(own.config)
    assert same(image, refined(model_dir, "sdxl", given, {}, 3, scheduler=scheduler))


def compel(refiner: Any, text: str) -> list[torch.Tensor]:
    """The refiner's one text encoder, set up as Compel's pages say for SDXL's second one."""
    reads = Compel(
        tokenizer=refiner.tokenizer_2,
        text_encoder=refiner.text_encoder_2,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=True,
        truncate_long_prompts=False,
    )
    return list(reads(text))


def test_a_weighted_prompt_for_the_refiner_alone_equals_stock(
    served: RunningServer, model_dir: Path
) -> None:
    given = parameters_for("StableDiffusionXLPipeline", "sdxl") | {"num_inference_steps": 4}
    text = "a (blue)1.6 fox in (snow)0.6"
    [image] = over_http(
        served,
        "sdxl",
        "StableDiffusionXLPipeline",
        given | {"seed": 3},
        refiner_model="sdxl_refiner",
        refiner_parameters={"prompt": text},
    )
    refiner = stock(model_dir / "checkpoints" / "sdxl_refiner", REFINING)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    embedded = dict(zip(names, compel(refiner, text), strict=True))
    against = compel(refiner, given["negative_prompt"])
    embedded |= {f"negative_{n}": v for n, v in zip(names, against, strict=True)}
    own = embedded | {"prompt": None, "negative_prompt": None}
    assert same(image, refined(model_dir, "sdxl", given, own, 3))
    assert not same(image, refined(model_dir, "sdxl", given, {"prompt": "a blue fox in snow"}, 3))
