"""Trains the UNet and the text encoder together to predict noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.demo_model.latents import Batches, CaptionWriter, encode
from scripts.demo_model.layout import LayoutReader, layouts, load_reader, read_relations
from scripts.demo_model.models import (
    load_autoencoder,
    new_text_encoder,
    new_unet,
    noise_schedule,
)
from scripts.demo_model.questions import held_out_questions
from scripts.demo_model.scenes import sample_training_scenes
from scripts.demo_model.training import Context, Plan, Trainer, new_folder, wait_for

_CAPTIONS_EACH = 4
_EMA_DECAY = 0.998
_SAVE_EVERY_STEPS = 1000
_SNR_CAP = 5.0
_WEIGHT_CAP = 100.0
_EARLY_SHARE = 0.35
_LAYOUT_WEIGHT = 0.1
_QUESTIONS = 200


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

    At low noise by min-SNR-5 (Hang et al., 2023). At high noise, where the layout is decided, an
    error in it hardly shows in the predicted noise; there the weight is that of predicting
    velocity, up to a cap reached at timestep 933: sampling in 20 steps begins at 951. Earlier
    weights, trained with a cap of 20 (reached at 765), left "left" and "right" a coin toss. That
    the cap was a cause was reasoned, not measured: the run that raised it was also the first with
    a reader of layouts.
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
    reader: LayoutReader
    average: AveragedModel
    trainer: Trainer

    def save(self, path: Path) -> None:
        parts = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "average": self.average.state_dict(),
            "trainer": self.trainer.state(),
        }
        torch.save(parts, path.with_suffix(".draft"))
        path.with_suffix(".draft").rename(path)

    def load(self, path: Path) -> None:
        parts = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(parts["model"])
        self.reader.load_state_dict(parts["reader"])
        self.average.load_state_dict(parts["average"])
        self.trainer.resume(parts["trainer"])


def train_diffusion(context: Context, plan: Plan) -> None:
    """Train until the plan is done; with a `diffusion.pt` in the work folder, go on from there.

    The average of the weights is saved now and then as the folder `averaged`, for a run cut short.
    """
    torch.manual_seed(context.seed)
    wait_for(context.work / "tokenizer" / "tokenizer_config.json")
    tokenizer = load_tokenizer(context)
    scenes = sample_training_scenes(plan.scenes, context.generator("diffusion"))
    writer = CaptionWriter(context, tokenizer)
    written = writer.start(scenes, _CAPTIONS_EACH, ["loose"])
    model = new_denoiser(context)
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
    wanted = layouts(scenes, context.device)
    deviation = float(batches.latents.std())
    print(f"[diffusion] {len(scenes)} scenes encoded, deviation {deviation:.3f}", flush=True)
    wait_for(context.work / "text")
    taught, reader = load_reader(context.work, context.device)
    model.text_encoder.load_state_dict(taught.state_dict())
    state = _new_state(model, reader, plan)
    saved = context.work / "diffusion.pt"
    if saved.exists():
        state.load(saved)
    loss = NoiseLoss(context.device)
    questions = held_out_questions(_QUESTIONS)

    def batch_loss() -> Tensor:
        rows = batches.rows(plan.batch)
        latents = batches.latents[rows]
        noise, timesteps = batches.noise(latents, _EARLY_SHARE)
        with context.autocast():
            noisy = loss.noisy(latents, noise, timesteps)
            words = model.text_encoder(batches.captions(rows))[0]
            predicted = model.unet(noisy, timesteps, words, return_dict=False)[0]
            layout = reader.loss(words, wanted[rows])
        return loss(predicted, noise, timesteps) + _LAYOUT_WEIGHT * layout

    def after() -> None:
        state.average.update_parameters(model)
        if state.trainer.step % _SAVE_EVERY_STEPS == 0:
            state.save(saved)
            _save_average(state, tokenizer, context.work / "averaged")
            right = read_relations(model.text_encoder, reader, tokenizer, questions)
            state.trainer.say(f"relations read from held-out captions: {right:.1f} %")

    state.trainer.run(batch_loss, after)
    _save_average(state, tokenizer, context.work / "diffusion")
    saved.unlink(missing_ok=True)


def _new_state(model: Denoiser, reader: LayoutReader, plan: Plan) -> _State:
    decay = get_ema_multi_avg_fn(_EMA_DECAY)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    trained = iter([*model.parameters(), *reader.parameters()])
    return _State(model, reader, average, Trainer("diffusion", trained, plan))


def _save_average(state: _State, tokenizer: CLIPTokenizer, path: Path) -> None:
    averaged = cast(Denoiser, state.average.module)
    with new_folder(path) as folder:
        averaged.unet.save_pretrained(folder / "unet")
        averaged.text_encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")


def new_denoiser(context: Context) -> Denoiser:
    """Return a UNet with the weights of `context.start`, or random ones, and a new text encoder."""
    unet = new_unet() if context.start is None else _load_unet(context.start)
    return Denoiser(unet, new_text_encoder(load_tokenizer(context))).to(context.device).train()


def load_denoiser(context: Context) -> Denoiser:
    """Load the trained UNet and text encoder, frozen."""
    folder = context.work / "diffusion"
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    model = Denoiser(_load_unet(folder), text_encoder).to(context.device).train()
    return model.requires_grad_(False)


def load_tokenizer(context: Context) -> CLIPTokenizer:
    """Load the tokenizer that the text stage wrote at its start."""
    return CLIPTokenizer.from_pretrained(context.work / "tokenizer")


def _load_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)


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
