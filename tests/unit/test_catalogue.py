"""What each pipeline takes, and what is said of parameters that it does not."""

import contextlib
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import catalogue
from supervisor.parameter_checks import image_count
from supervisor.parameters import MAX_SEED, RULES

TWELVE = [
    f"StableDiffusion{size}{control}{kind}Pipeline"
    for size in ("", "XL")
    for control in ("", "ControlNet")
    for kind in ("", "Img2Img", "Inpaint")
]
PICTURE = "aWdp"


def refusal(name: str, raw: object, **options: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as refused:
        catalogue.read(name, raw, **options)
    return str(refused.value)


def base(**parameters: object) -> dict[str, object]:
    return {"prompt": "a lighthouse", **parameters}


def test_the_twelve_classes_are_served_with_their_families() -> None:
    assert set(TWELVE) == set(catalogue.FAMILIES)
    assert set(TWELVE) <= set(catalogue.pipelines())


def test_pipelines_outside_the_twelve_are_of_no_known_family() -> None:
    assert catalogue.pipeline("FluxPipeline").families == ("other",)


@pytest.mark.parametrize("name", TWELVE)
def test_every_parameter_of_the_twelve_has_a_sentence(name: str) -> None:
    assert set(catalogue.pipeline(name).parameters) <= set(RULES)


def test_no_rule_is_left_over_from_an_older_diffusers() -> None:
    used = {key for item in catalogue.pipelines().values() for key in item.parameters}
    assert set(RULES) <= used


def test_every_served_pipeline_has_a_type_and_a_schema() -> None:
    for name, pipeline in catalogue.pipelines().items():
        schema = json.loads(json.dumps(catalogue.parameters_schema(name)))
        assert set(schema["properties"]) == set(pipeline.parameters)
        assert schema["additionalProperties"] is False


def test_tensors_hooks_and_file_names_are_out_of_reach() -> None:
    forbidden = ("generator", "latents", "embeds", "callback", "output_type", "kwargs", "fonts")
    for pipeline in catalogue.pipelines().values():
        assert not [name for name in pipeline.parameters if any(word in name for word in forbidden)]


def test_the_schema_tells_sentences_ranges_defaults_and_what_is_needed() -> None:
    schema = catalogue.parameters_schema("StableDiffusionImg2ImgPipeline")
    assert schema["required"] == ["prompt", "image"]
    strength = schema["properties"]["strength"]
    assert strength["default"] == 0.8
    assert (strength["minimum"], strength["maximum"]) == (0, 1)
    assert "drawn anew" in strength["description"]
    assert schema["properties"]["image"]["contentEncoding"] == "base64"


def test_the_control_picture_has_one_name_for_callers() -> None:
    for name in TWELVE:
        pipeline = catalogue.pipeline(name)
        assert ("control_image" in pipeline.pictures) == pipeline.takes_controlnet
    started_from_noise = catalogue.pipeline("StableDiffusionControlNetPipeline")
    assert started_from_noise.call_names["control_image"] == "image"
    started_from_picture = catalogue.pipeline("StableDiffusionControlNetImg2ImgPipeline")
    assert started_from_picture.call_names["control_image"] == "control_image"


def test_what_the_server_does_itself_never_reaches_the_call() -> None:
    assert not {"seed", "num_images_per_prompt"} & set(
        catalogue.pipeline("StableDiffusionPipeline").call_names
    )


def test_what_is_not_given_is_left_out_and_null_is_kept() -> None:
    read = catalogue.read("StableDiffusionPipeline", base(clip_skip=None, guidance_scale=7))
    assert read == {"prompt": "a lighthouse", "clip_skip": None, "guidance_scale": 7.0}


def test_sizes_become_tuples() -> None:
    read = catalogue.read("StableDiffusionXLPipeline", base(original_size=[64, 32]))
    assert read["original_size"] == (64, 32)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"width": 100}, "width"),
        ({"width": 0}, "width"),
        ({"height": 10**6}, "height"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": "20"}, "num_inference_steps"),
        ({"num_images_per_prompt": 17}, "num_images_per_prompt"),
        ({"seed": 10**400}, "seed"),
        ({"seed": -2}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"seed": [10**400]}, "seed[0]"),
        ({"seed": MAX_SEED, "num_images_per_prompt": 2}, "seed"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": "a" * 20_000}, "prompt"),
        ({"prompt": ["a"] * 9, "num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt"),
        ({"timesteps": [10], "sigmas": [1.0]}, "sigmas"),
        ({"width": 4096, "height": 4104}, "width"),
        ({"original_size": [64, 64]}, "original_size"),
        ({"latents": []}, "latents"),
    ],
)
def test_a_refusal_names_the_field(parameters: dict[str, object], field: str) -> None:
    said = refusal("StableDiffusionPipeline", base(**parameters), max_pixels=2**24)
    assert said.endswith(f"at `$.parameters.{field}`")


def test_an_unknown_parameter_is_told_which_ones_there_are() -> None:
    said = refusal("StableDiffusionPipeline", base(original_size=[64, 64]))
    assert "StableDiffusionPipeline has no such parameter; it takes `clip_skip`" in said


@pytest.mark.parametrize("raw", [None, [], "prompt", 7])
def test_parameters_are_an_object(raw: object) -> None:
    assert "Expected `object`" in refusal("StableDiffusionPipeline", raw)


def test_a_missing_input_is_named() -> None:
    assert "`$.parameters.prompt`" in refusal("StableDiffusionPipeline", {})
    said = refusal("StableDiffusionXLInpaintPipeline", base(image=PICTURE))
    assert (
        said == "StableDiffusionXLInpaintPipeline needs `mask_image` - at `$.parameters.mask_image`"
    )


@pytest.mark.parametrize("strength", [0, 0.01, 2])
def test_a_strength_without_a_step_or_out_of_range_is_refused(strength: float) -> None:
    said = refusal("StableDiffusionImg2ImgPipeline", base(image=PICTURE, strength=strength))
    assert said.endswith("`$.parameters.strength`")


def test_the_checkpoint_s_own_steps_count_for_the_strength() -> None:
    raw = base(image=PICTURE, strength=0.5)
    said = refusal("StableDiffusionXLImg2ImgPipeline", raw, defaults={"num_inference_steps": 1})
    assert "got 0.5 x 1" in said
    assert catalogue.read("StableDiffusionXLImg2ImgPipeline", raw) == raw


def test_denoising_starts_before_it_ends() -> None:
    raw = base(image=PICTURE, denoising_start=0.8, denoising_end=0.8)
    assert "denoising_start" in refusal("StableDiffusionXLImg2ImgPipeline", raw)
    raw = base(image=PICTURE, denoising_start=0.2, denoising_end=0.8, strength=0.0)
    assert catalogue.read("StableDiffusionXLImg2ImgPipeline", raw) == raw


def test_a_start_from_given_timesteps_counts_those() -> None:
    raw = base(image=PICTURE, timesteps=[900, 500], strength=0.5)
    assert catalogue.read("StableDiffusionImg2ImgPipeline", raw) == raw


@pytest.mark.parametrize(
    ("parameters", "models", "field"),
    [
        ({"control_image": PICTURE}, 0, "control_model"),
        ({"control_image": PICTURE}, 2, "parameters.control_image"),
        ({"control_image": [PICTURE] * 3}, 2, "parameters.control_image"),
        (
            {"control_image": [PICTURE] * 2, "controlnet_conditioning_scale": [1.0]},
            2,
            "parameters.controlnet_conditioning_scale",
        ),
        (
            {"control_image": PICTURE, "controlnet_conditioning_scale": [1.0]},
            1,
            "parameters.controlnet_conditioning_scale",
        ),
        (
            {"control_image": PICTURE, "control_guidance_start": 1.0},
            1,
            "parameters.control_guidance_start",
        ),
        (
            {
                "control_image": [PICTURE] * 2,
                "control_guidance_start": 0.5,
                "control_guidance_end": [0.9, 0.4],
            },
            2,
            "parameters.control_guidance_start",
        ),
        ({}, 1, "parameters.control_image"),
    ],
)
def test_controlnets_pictures_and_numbers_go_together(
    parameters: dict[str, object], models: int, field: str
) -> None:
    said = refusal("StableDiffusionControlNetPipeline", base(**parameters), control_models=models)
    assert said.endswith(f"`$.{field}`")


def test_several_controlnets_take_a_picture_and_a_number_each() -> None:
    raw = base(
        control_image=[PICTURE] * 2,
        controlnet_conditioning_scale=[0.5, 1.0],
        control_guidance_start=[0.0, 0.2],
    )
    assert catalogue.read("StableDiffusionControlNetPipeline", raw, control_models=2) == raw


def test_a_controlnet_is_refused_where_there_is_no_place_for_it() -> None:
    said = refusal("StableDiffusionPipeline", base(), control_models=1)
    assert said == "StableDiffusionPipeline takes no ControlNet - at `$.control_model`"


def test_one_union_controlnet_takes_several_pictures() -> None:
    raw = base(control_image=[PICTURE] * 2, control_mode=[0, 3])
    name = "StableDiffusionXLControlNetUnionPipeline"
    assert catalogue.read(name, raw, control_models=1) == raw


def test_pictures_are_counted_over_prompts() -> None:
    assert image_count({}) == 1
    assert image_count({"prompt": "a", "num_images_per_prompt": 3}) == 3
    assert image_count({"prompt": ["a", "b"], "num_images_per_prompt": 3}) == 6


@pytest.mark.parametrize(
    ("family", "inputs", "controlnet", "chosen"),
    [
        ("sd15", set(), False, "StableDiffusionPipeline"),
        ("sd21", {"image"}, False, "StableDiffusionImg2ImgPipeline"),
        ("sdxl", {"image", "mask_image"}, False, "StableDiffusionXLInpaintPipeline"),
        ("sdxl", {"control_image"}, False, "StableDiffusionXLControlNetPipeline"),
        ("sd15", set(), True, "StableDiffusionControlNetPipeline"),
        ("sd15", {"image", "control_image"}, True, "StableDiffusionControlNetImg2ImgPipeline"),
        (
            "sdxl",
            {"image", "mask_image", "control_image"},
            True,
            "StableDiffusionXLControlNetInpaintPipeline",
        ),
        ("sdxl_refiner", set(), False, "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl_refiner", {"mask_image"}, False, "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_the_pipeline_follows_from_family_and_inputs(
    family: str, inputs: set[str], controlnet: bool, chosen: str
) -> None:
    assert catalogue.choose(family, inputs, controlnet) == chosen


def test_a_pipeline_must_be_named_where_none_follows() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"`\$\.pipeline`"):
        catalogue.choose("other", set(), False)
    with pytest.raises(msgspec.ValidationError, match=r"`\$\.control_model`"):
        catalogue.choose("sdxl_refiner", set(), True)


def test_a_pipeline_that_is_not_served_says_why() -> None:
    with pytest.raises(msgspec.ValidationError, match="StableVideoDiffusionPipeline: makes videos"):
        catalogue.pipeline("StableVideoDiffusionPipeline")
    with pytest.raises(msgspec.ValidationError, match="no such image pipeline"):
        catalogue.pipeline("NoPipeline")


VALUES: list[object] = [
    *(None, True, False, 0, 1, -1, 8, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf),
    *("", "a", PICTURE, [], {}, [1], [0.5], [None], ["a"], [[1]], [1, 1], [0.9, 0.1], {"a": 1}),
]
NAMES = sorted(catalogue.pipeline("StableDiffusionXLControlNetPipeline").parameters)


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES)), st.integers(0, 3))
def test_whatever_json_brings_is_read_or_refused(raw: dict[str, Any], models: int) -> None:
    raw = base(control_image=PICTURE) | raw
    with contextlib.suppress(msgspec.ValidationError):
        catalogue.read(
            "StableDiffusionXLControlNetPipeline", raw, control_models=models, max_pixels=2**24
        )
