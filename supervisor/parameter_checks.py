"""What must hold between parameters: rules over several fields, which no type can express.

Every rule takes the parameters as the pipeline would see them (given values over defaults) and
raises `msgspec.ValidationError` that names the field. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import msgspec

from supervisor.parameters import MAX_IMAGES, MAX_SEED

Parameters = Mapping[str, Any]

PROMPTS = tuple(
    f"{kind}{suffix}" for kind in ("prompt", "negative_prompt") for suffix in ("", "_2", "_3", "_4")
)
CONTROL_LISTS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")


def refuse(sentence: str, field: str) -> NoReturn:
    """Raise as msgspec does, so that every refusal names its field in the same way."""
    raise msgspec.ValidationError(f"{sentence} - at `$.parameters.{field}`")


def image_count(parameters: Parameters) -> int:
    """How many pictures are asked for: prompts times pictures of each."""
    prompt = parameters.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    return prompts * int(parameters.get("num_images_per_prompt") or 1)


def check_prompts(parameters: Parameters) -> None:
    """Lists of prompts go together one by one."""
    prompt = parameters.get("prompt")
    count = len(prompt) if isinstance(prompt, list) else 1
    for name in PROMPTS:
        value = parameters.get(name)
        if isinstance(value, list) and len(value) != count:
            refuse(f"Expected {count} texts, one for each prompt, got {len(value)}", name)


def check_image_count(parameters: Parameters) -> None:
    count = image_count(parameters)
    if count > MAX_IMAGES:
        refuse(
            f"Expected at most {MAX_IMAGES} pictures in a request, got {count}",
            "num_images_per_prompt",
        )


def check_seeds(parameters: Parameters) -> None:
    """A list has a seed for each picture; a number leaves room to count up from."""
    count, seed = image_count(parameters), parameters.get("seed")
    if isinstance(seed, list) and len(seed) != count:
        refuse(f"Expected {count} seeds, one for each picture, got {len(seed)}", "seed")
    if isinstance(seed, int) and seed + count - 1 > MAX_SEED:
        refuse(f"Expected a seed of at most {MAX_SEED - count + 1} for {count} pictures", "seed")


def check_size(parameters: Parameters, max_pixels: int | None) -> None:
    width, height = parameters.get("width"), parameters.get("height")
    if max_pixels and width and height and width * height > max_pixels:
        refuse(
            f"Expected at most {max_pixels} pixels, got {width} x {height} = {width * height}",
            "width",
        )


def check_schedule(parameters: Parameters) -> None:
    """One schedule, and at least one step of it."""
    timesteps, sigmas = parameters.get("timesteps"), parameters.get("sigmas")
    if timesteps and sigmas:
        refuse("Expected either `timesteps` or `sigmas`, got both", "sigmas")
    steps = len(timesteps or sigmas or ()) or parameters.get("num_inference_steps")
    strength = parameters.get("strength")
    if strength is None or steps is None or parameters.get("denoising_start") is not None:
        return
    if int(steps * strength) < 1:
        refuse(
            f"Expected `strength` x `num_inference_steps` of at least 1, got {strength} x {steps}",
            "strength",
        )


def check_denoising_range(parameters: Parameters) -> None:
    start, end = parameters.get("denoising_start"), parameters.get("denoising_end")
    if start is not None and end is not None and start >= end:
        refuse(f"Expected less than `denoising_end`, {end}, got {start}", "denoising_start")


def check_control_range(parameters: Parameters) -> None:
    """Every ControlNet begins before it ends."""
    start, end = parameters.get("control_guidance_start"), parameters.get("control_guidance_end")
    if start is None or end is None:
        return
    pairs = zip(_spread(start, end), _spread(end, start), strict=False)
    if any(first >= last for first, last in pairs):
        refuse(f"Expected less than `control_guidance_end`, {end}", "control_guidance_start")


def check_control_counts(parameters: Parameters, control_models: int | None) -> None:
    """A picture for each ControlNet, and in every list a number for each."""
    images = parameters.get("control_image")
    if images is None:
        return
    count = len(images) if isinstance(images, list) else 1
    if control_models is not None and count != control_models:
        refuse(
            f"Expected {control_models} pictures, one for each ControlNet, got {count}",
            "control_image",
        )
    if count == 1 and isinstance(parameters.get("controlnet_conditioning_scale"), list):
        refuse("Expected one number for one ControlNet", "controlnet_conditioning_scale")
    for name in CONTROL_LISTS:
        value = parameters.get(name)
        if isinstance(value, list) and len(value) != count:
            refuse(f"Expected {count} numbers, one for each ControlNet, got {len(value)}", name)


def check_all(
    parameters: Parameters, *, max_pixels: int | None, control_models: int | None
) -> None:
    """Every rule, in the order in which a caller would put things right."""
    check_prompts(parameters)
    check_image_count(parameters)
    check_seeds(parameters)
    check_size(parameters, max_pixels)
    check_schedule(parameters)
    check_denoising_range(parameters)
    check_control_counts(parameters, control_models)
    check_control_range(parameters)


def _spread(value: Any, other: Any) -> Iterable[Any]:
    """A list as it is; a number as often as the other side has numbers."""
    if isinstance(value, list):
        return value
    return [value] * (len(other) if isinstance(other, list) else 1)
