"""Stock pipelines with tiny random weights, and what they draw."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.tools import tiny


def pipeline(family: str, seed: int = 0) -> Any:
    """The family's own pipeline in float32, loaded anew from its folder."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(_folder(family, seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _folder(family: str, seed: int) -> Path:
    parent = tempfile.TemporaryDirectory(prefix="tiny-")
    _KEPT.append(parent)
    return tiny.build_checkpoint(Path(parent.name) / family, family, seed)


_KEPT: list[Any] = []
"""Folders that are removed when the tests end."""


def latents(pipe: Any, seed: int = 7, **parameters: Any) -> torch.Tensor:
    """What one call draws, before the VAE: [1, 4, 2, 2] of the denoiser's type."""
    values: dict[str, Any] = {"num_inference_steps": 3, "width": 16, "height": 16}
    if "prompt_embeds" not in parameters:
        values["prompt"] = "a red fox"
    values |= parameters
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        result: torch.Tensor = pipe(generator=generator, output_type="latent", **values).images
    return result
