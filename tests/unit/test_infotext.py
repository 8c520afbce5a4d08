"""What is written into pictures' files."""

import json
from typing import Any

from ipc.messages import Call
from supervisor import VERSION, infotext

INPUTS: dict[str, Any] = {
    "checkpoint": "dreamshaper_8.safetensors",
    "pipeline": "StableDiffusionPipeline",
    "parameters": {
        "prompt": "a fox",
        "negative_prompt": "blurry, dark",
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "width": 512,
        "height": 768,
        "seed": 7,
        "num_images_per_prompt": 2,
    },
    "loras": [],
    "batch_id": "mine",
    "store_images": True,
}


def test_the_text_is_the_one_that_a1111_writes() -> None:
    call = Call(seed=8)
    assert infotext.texts(INPUTS, call, "EulerAncestralDiscreteScheduler")["parameters"] == (
        "a fox\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 30, Sampler: Euler a, CFG scale: 7.5, Seed: 8, Size: 512x768, "
        "Model: dreamshaper_8.safetensors, Pipeline: StableDiffusionPipeline, "
        f"Version: IGI {VERSION}"
    )


def test_what_was_not_given_is_not_told() -> None:
    inputs = INPUTS | {"parameters": {"prompt": "a fox"}}
    text = infotext.texts(inputs, Call(seed=1), None)["parameters"]
    assert text.startswith("a fox\nSeed: 1, Model: ")


def test_a_value_with_a_comma_or_a_colon_is_quoted() -> None:
    inputs = INPUTS | {"loras": [{"model": "a", "scale": 0.5}, {"model": "b", "scale": 1.0}]}
    text = infotext.texts(inputs | {"checkpoint": "x: y"}, Call(seed=1), None)["parameters"]
    assert 'Model: "x: y"' in text
    assert 'Lora: "a (0.5), b (1.0)"' in text


def test_the_name_that_the_caller_gave_the_sampler_is_kept() -> None:
    inputs = INPUTS | {"a1111_scheduler": "DPM++ 2M Karras"}
    text = infotext.texts(inputs, Call(seed=1), "DPMSolverMultistepScheduler")["parameters"]
    assert "Sampler: DPM++ 2M Karras" in text


def test_a_class_without_a_name_in_a1111_is_told_as_it_is() -> None:
    assert (
        "Sampler: SCMScheduler"
        in infotext.texts(INPUTS, Call(seed=1), "SCMScheduler")["parameters"]
    )


def test_our_json_is_a_request_for_this_one_picture() -> None:
    inputs = INPUTS | {"parameters": INPUTS["parameters"] | {"prompt": ["a fox", "a hare"]}}
    call = Call(seed=9, parameters={"prompt": "a hare"})
    request = json.loads(infotext.texts(inputs, call, None)["igi"])
    assert request["parameters"]["prompt"] == "a hare"
    assert request["parameters"]["seed"] == 9
    assert "num_images_per_prompt" not in request["parameters"]
    assert not set(infotext.REQUEST_ONLY) & set(request)
