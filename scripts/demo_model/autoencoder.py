"""Trains the autoencoder, and the decoder that renders the same latents on warm paper."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from scripts.demo_model.models import SCALING_FACTOR, load_autoencoder, new_autoencoder
from scripts.demo_model.render import draw, render, render_paper
from scripts.demo_model.scenes import Scenes, sample_scenes
from scripts.demo_model.training import Context, Plan, Trainer, new_folder, wait_for

_KL_WEIGHT = 1e-4
_EDGE_WEIGHT = 6.0
"""How much more a pixel counts beside a rim. Small shapes are all rim, and few pixels: without this
the first decoder turned small stars into blobs, and only 84 % of its shapes were recognised."""


def train_autoencoder(context: Context, plan: Plan) -> None:
    """Train the VAE on absolute error of pixels and of their slopes, with a little KL."""
    torch.manual_seed(context.seed)
    vae = _start(context)
    if context.compiled:
        vae.encoder.compile()
        vae.decoder.compile()
    scenes, fill = _scenes(context, plan)
    batches = _batches(context, plan, draw(render, scenes, fill))
    trainer = Trainer("autoencoder", vae.parameters(), plan)

    def loss() -> Tensor:
        (pixels,) = next(batches)
        with context.autocast():
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        total: Tensor = _pixel_loss(restored.float(), pixels) + _KL_WEIGHT * kl
        return total

    trainer.run(loss)
    finished = new_autoencoder().to(context.device)  # without what was compiled for training
    finished.load_state_dict(vae.state_dict())
    normalise_latents(finished, render(scenes[slice(0, plan.batch)]) * 2 - 1)
    with new_folder(context.work / "autoencoder") as folder:
        finished.save_pretrained(folder)


def train_paper(context: Context, plan: Plan) -> None:
    """Fine-tune the decoder alone to draw the same latents on paper; the encoder stays as it is."""
    wait_for(context.work / "autoencoder")
    vae = load_autoencoder(context.work).to(context.device).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    if context.compiled:
        vae.decoder.compile()
    scenes, fill = _scenes(context, plan)
    batches = _batches(context, plan, draw(render, scenes, fill), draw(render_paper, scenes, fill))
    trainer = Trainer("paper", vae.parameters(), plan)

    def loss() -> Tensor:
        pixels, paper = next(batches)
        with context.autocast():
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample()
            restored = vae.decode(latents).sample
        return _pixel_loss(restored.float(), paper)

    trainer.run(loss)
    with new_folder(context.work / "paper") as folder:
        vae.save_pretrained(folder)


def adopt_autoencoder(context: Context) -> None:
    """Take the VAE of `context.start` as it is, instead of training one."""
    if context.start is None:
        raise ValueError("cannot adopt an autoencoder: no checkpoint to start with is named")
    if not (context.work / "autoencoder").exists():
        vae = AutoencoderKL.from_pretrained(context.start / "vae", dtype=torch.float32)
        with new_folder(context.work / "autoencoder") as folder:
            vae.save_pretrained(folder)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Rescale the latents, changing no picture, so that SCALING_FACTOR gives them unit variance.

    The two 1x1 convolutions around the latents take up each channel's mean and deviation, measured
    on `pixels` ([N, 3, H, W] in -1..1). Stable Diffusion's usual factor is then right.
    """
    latents = vae.encode(pixels).latent_dist.mean
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    _rescale_latents(vae, mean, 1 / (SCALING_FACTOR * deviation))


def _start(context: Context) -> AutoencoderKL:
    """Return a new VAE, or a finished one with latents of unit variance, for the KL term."""
    if context.start is None:
        return new_autoencoder().to(context.device)
    vae = AutoencoderKL.from_pretrained(context.start / "vae").to(context.device)
    unit = torch.full((vae.config.latent_channels,), SCALING_FACTOR, device=context.device)
    _rescale_latents(vae, torch.zeros_like(unit), unit)
    return vae


@torch.no_grad()
def _rescale_latents(vae: AutoencoderKL, mean: Tensor, factor: Tensor) -> None:
    """Subtract `mean` from the latents and multiply by `factor`, [channels] each; undo it after."""
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(factor)
    before.weight[:channels] *= factor[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) * factor
    before.bias[channels:] += 2 * factor.log()  # the second half holds log variances ...
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight /= factor[None, :, None, None]


def _pixel_loss(restored: Tensor, pixels: Tensor) -> Tensor:
    """Absolute error of values and of differences between neighbours, most of all beside rims."""
    rims = functional.max_pool2d(pixels, 5, 1, 2) + functional.max_pool2d(-pixels, 5, 1, 2)
    weights = 1 + _EDGE_WEIGHT * rims.amax(1, keepdim=True).clamp(max=1)
    error = (restored - pixels) * weights
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * slopes


def _scenes(context: Context, plan: Plan) -> tuple[Scenes, Tensor]:
    """Return scenes and their fill: mostly filled, some outlined, some between."""
    generator = context.generator("autoencoder")
    scenes = sample_scenes(plan.scenes, generator).to(context.device)
    fill = torch.rand(plan.scenes, generator=generator) * 2.2 - 0.2
    return scenes, fill.clamp(0, 1).to(context.device)


def _batches(context: Context, plan: Plan, *pictures: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield random batches of the same rows of each pictures ([N, 3, H, W] uint8), in -1..1."""
    generator = context.generator("batches", context.device)
    while True:
        rows = torch.randint(plan.scenes, (plan.batch,), generator=generator, device=context.device)
        yield tuple(some[rows].float() / 127.5 - 1 for some in pictures)
