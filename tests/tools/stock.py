"""Stock pipelines with tiny random weights, in memory, and the pictures they draw."""

from typing import Any

import torch

from tests.tools import tiny


def pipeline(family: str, seed: int = 0) -> Any:
    """The family's own pipeline, as `from_pretrained` would give it."""
    kind = tiny.architecture(family)
    parts: dict[str, Any] = {
        "vae": tiny.vae(kind, seed),
        "unet": tiny.unet(kind, seed),
        "scheduler": tiny.scheduler(family),
        "tokenizer": None,
        "text_encoder": None,
    }
    for index in tiny.text_indices(kind):
        suffix = "_2" if index else ""
        parts[f"tokenizer{suffix}"] = tiny.tokenizer(second=index == 1)
        parts[f"text_encoder{suffix}"] = tiny.text_encoder(kind, index, seed)
    pipe = tiny.pipeline(kind, parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
