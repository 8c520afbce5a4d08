"""The same picture twice: over HTTP, and from a stock pipeline's own call."""

import base64
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import httpx
import numpy as np
import torch
from PIL import Image

from tests.tools.server import RunningServer

torch.set_num_threads(1)


def as_base64(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture.convert("RGB"))


def same(some: Image.Image, other: Image.Image) -> bool:
    """To the last bit of every pixel."""
    return np.array_equal(pixels(some), pixels(other))


def share_changed(some: Image.Image, other: Image.Image) -> float:
    """The share of bytes that differ, 0 to 1; infinite where one differs by more than 1."""
    difference = np.abs(pixels(some).astype(int) - pixels(other))
    return float(np.mean(difference != 0)) if difference.max() <= 1 else float("inf")


def over_http(
    server: RunningServer,
    checkpoint: str,
    pipeline: str,
    parameters: Mapping[str, Any],
    **more: Any,
) -> list[Image.Image]:
    """Pillow pictures among the parameters travel as base64."""
    answer = asked(server, checkpoint, pipeline, parameters, **more)
    assert answer.status_code == 200, answer.text
    return received(answer)


def asked(
    server: RunningServer,
    checkpoint: str,
    pipeline: str,
    parameters: Mapping[str, Any],
    **more: Any,
) -> httpx.Response:
    """The answer, whatever it is."""
    body = {
        "checkpoint": checkpoint,
        "parameters": {name: _encoded(value) for name, value in parameters.items()},
        "output_format": "png",
        # Pictures that share a step differ by roundings from those made alone.
        "deterministic": _makes_several(parameters),
        **more,
    }
    return server.client.post(f"/generate/{pipeline}", json=body)


def received(answer: httpx.Response) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer.json()["images"]]


def _makes_several(parameters: Mapping[str, Any]) -> bool:
    several = parameters.get("num_images_per_prompt", 1) > 1
    return several or isinstance(parameters.get("prompt"), list)


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded(one) for one in value]
    return as_base64(value) if isinstance(value, Image.Image) else value


@cache
def components(folder: Path) -> dict[str, Any]:
    """A checkpoint's modules and flags as `from_pretrained` gives them; nobody may change them."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    flags = {name: value for name, value in loaded.config.items() if isinstance(value, bool)}
    return flags | loaded.components


def stock(folder: Path, pipeline: str, **more: Any) -> Any:
    """A stock pipeline of that class, with a scheduler of its own."""
    kind = getattr(diffusers, pipeline)
    parts = {**components(folder), **more}
    parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
    expected = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    known = {name for keys in kind._get_signature_keys(kind) for name in keys}
    parts = {name: part for name, part in {**expected, **parts}.items() if name in known}
    if "requires_safety_checker" in known:
        parts["requires_safety_checker"] = False
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, seed: int, **parameters: Any) -> Image.Image:
    """One stock call for one picture, with one generator on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        picture: Image.Image = pipe(generator=generator, **parameters).images[0]
    return picture


def noise_picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def half_mask(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """White where the picture is to be made anew: its right half."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask
