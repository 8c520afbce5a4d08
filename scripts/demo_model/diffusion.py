"""Trains the UNet and the text encoder together to predict noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.demo_model.captions import known_words
from scripts.demo_model.latents import Batches, CaptionWriter, encode
from scripts.demo_model.models import (
    load_autoencoder,
    new_text_encoder,
    new_unet,
    noise_schedule,
)
from scripts.demo_model.scenes import sample_scenes
from scripts.demo_model.tokenizer import write_tokenizer
from scripts.demo_model.training import Context, Plan, Trainer, new_folder, wait_for

_CAPTIONS_EACH = 4
_EMA_DECAY = 0.998
_SAVE_EVERY_STEPS = 1000
_SNR_CAP = 5.0
_WEIGHT_CAP = 20.0


class Denoiser(nn.Module):
    """UNet and text encoder as one module, so that they are averaged and saved together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict the noise in [B, 4, H, W] latents from [B, 77] tokens."""
        words = self.text_encoder(tokens)[0]
        predicted: Tensor = self.unet(noisy, timesteps, words, return_dict=False)[0]
        return predicted


class NoiseLoss:
    """Squared error of predicted noise, weighted so that layout and detail are both learnt.

    At low noise by min-SNR-5 (Hang et al., 2023). At high noise an error in the layout hardly shows
    in the predicted noise, so with even weights (seen in a first run) "left" and "right" were not
    learnt at all; there the weight is that of predicting velocity, up to a cap.
    """

    def __init__(self, device: torch.device) -> None:
        self._signal = noise_schedule().alphas_cumprod.to(device)
        snr = self._signal / (1 - self._signal)
        self._weights = ((snr.clamp(max=_SNR_CAP) + 1) / snr).clamp(max=_WEIGHT_CAP)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix latents with noise as far as each row's timestep says."""
        signal = self._signal[timesteps][:, None, None, None]
        mixed: Tensor = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        return mixed

    def __call__(self, predicted: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the weighted mean over a batch, in float32."""
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        total: Tensor = (error * self._weights[timesteps]).mean()
        return total


@dataclass
class _State:
    """What is trained, its average, and who trains it."""

    model: Denoiser
    average: AveragedModel
    trainer: Trainer

    def save(self, path: Path) -> None:
        parts = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "trainer": self.trainer.state(),
        }
        torch.save(parts, path.with_suffix(".draft"))
        path.with_suffix(".draft").rename(path)

    def load(self, path: Path) -> None:
        parts = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        self.trainer.resume(parts["trainer"])


def train_diffusion(context: Context, plan: Plan) -> None:
    """Train until the plan is done; with a `diffusion.pt` in the work folder, go on from there."""
    torch.manual_seed(context.seed)
    tokenizer = write_tokenizer(known_words(), context.work / "tokenizer")
    scenes = sample_scenes(plan.scenes, context.generator("diffusion"))
    writer = CaptionWriter(context, tokenizer)
    written = writer.start(scenes, _CAPTIONS_EACH, ["loose"])
    model = new_denoiser(context)
    decay = get_ema_multi_avg_fn(_EMA_DECAY)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    state = _State(model, average, Trainer("diffusion", model.parameters(), plan))
    saved = context.work / "diffusion.pt"
    if saved.exists():
        state.load(saved)
    if context.compiled:
        model.unet.compile()
        _warm_up(context, model, plan.batch)
    wait_for(context.work / "autoencoder")
    vae = load_autoencoder(context.work).to(context.device)
    batches = Batches(
        latents=encode(context, vae, scenes),
        tokens=writer.collect(written, context.device),
        unconditional=writer.unconditional(context.device),
        generator=context.generator("noise", context.device),
    )
    state.trainer.say(f"{len(scenes)} scenes encoded, deviation {float(batches.latents.std()):.3f}")
    loss = NoiseLoss(context.device)

    def batch_loss() -> Tensor:
        rows = batches.rows(plan.batch)
        latents = batches.latents[rows]
        noise, timesteps = batches.noise(latents)
        with context.autocast():
            noisy = loss.noisy(latents, noise, timesteps)
            predicted = model(noisy, timesteps, batches.captions(rows))
        return loss(predicted, noise, timesteps)

    def after() -> None:
        average.update_parameters(model)
        if state.trainer.step % _SAVE_EVERY_STEPS == 0:
            state.save(saved)

    state.trainer.run(batch_loss, after)
    with new_folder(context.work / "diffusion") as folder:
        averaged = cast(Denoiser, average.module)
        averaged.unet.save_pretrained(folder / "unet")
        averaged.text_encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
    saved.unlink(missing_ok=True)


def new_denoiser(context: Context) -> Denoiser:
    """Return what training begins with: the weights of `context.start`, or random ones."""
    if context.start is not None:
        return _load(context, context.start)
    return Denoiser(new_unet(), new_text_encoder(load_tokenizer(context))).to(context.device)


def load_denoiser(context: Context) -> Denoiser:
    """Load the trained UNet and text encoder, frozen."""
    return _load(context, context.work / "diffusion").requires_grad_(False)


def load_tokenizer(context: Context) -> CLIPTokenizer:
    """Load the tokenizer that the diffusion stage wrote at its start."""
    return CLIPTokenizer.from_pretrained(context.work / "tokenizer")


def _load(context: Context, folder: Path) -> Denoiser:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return Denoiser(unet, text_encoder).to(context.device).train()


def _warm_up(context: Context, model: Denoiser, batch: int) -> None:
    """Compile forward and backward on empty data, while another process trains the autoencoder."""
    side = model.unet.config.sample_size
    latents = torch.zeros(batch, 4, side, side, device=context.device)
    timesteps = torch.zeros(batch, dtype=torch.long, device=context.device)
    tokens = torch.zeros(batch, 77, dtype=torch.long, device=context.device)
    with context.autocast():
        predicted = model(latents, timesteps, tokens)
    predicted.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
