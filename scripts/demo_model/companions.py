"""Trains the companions: a LoRA that draws outlines, and a ControlNet that follows edges."""

from typing import Final

from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from scripts.demo_model.captions import Nouns
from scripts.demo_model.diffusion import NoiseLoss, load_denoiser, load_tokenizer, new_denoiser
from scripts.demo_model.latents import Batches, CaptionWriter, encode
from scripts.demo_model.models import load_autoencoder, new_controlnet
from scripts.demo_model.render import draw, render_edges
from scripts.demo_model.scenes import Scenes, sample_scenes
from scripts.demo_model.training import Context, Plan, Trainer, new_folder, wait_for

_CAPTIONS_EACH: Final = 4
_RANK: Final = 16
_ATTENTION: Final = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
OUTLINE_FILE: Final = "outline_lora.safetensors"


def train_outline(context: Context, plan: Plan) -> None:
    """Train a LoRA whose scale is a dial: shapes filled at 0, tinted at 0.5, outlined at 1."""
    scenes, batches = _data(context, plan, "outline", ["loose"])
    vae = load_autoencoder(context.work).to(context.device)
    latents = {0.5: encode(context, vae, scenes, fill=0.5), 1.0: batches.latents}
    wait_for(context.work / "diffusion")
    model = load_denoiser(context)
    model.unet.add_adapter(
        LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=list(_ATTENTION)), "outline"
    )
    trainer = Trainer("outline", model.unet.parameters(), plan)
    loss = NoiseLoss(context.device)

    def batch_loss() -> Tensor:
        scale = 0.5 if trainer.step % 3 == 0 else 1.0
        _set_scale(model.unet, scale)
        rows = batches.rows(plan.batch)
        clean = latents[scale][rows]
        noise, timesteps = batches.noise(clean)
        with context.autocast():
            noisy = loss.noisy(clean, noise, timesteps)
            predicted = model(noisy, timesteps, batches.captions(rows))
        return loss(predicted, noise, timesteps)

    trainer.run(batch_loss)
    weights = get_peft_model_state_dict(model.unet, adapter_name="outline")
    with new_folder(context.work / "outline") as folder:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=weights, weight_name=OUTLINE_FILE
        )


def train_edges(context: Context, plan: Plan) -> None:
    """Train a ControlNet on edge maps, mostly with captions that leave the shape to the edges."""
    nouns: list[Nouns] = ["loose", "vague", "vague", "wrong"]
    scenes, batches = _data(context, plan, "edges", nouns)
    edges = draw(render_edges, scenes.to(context.device))[:, :1]  # the three channels are equal
    model = new_denoiser(context).requires_grad_(False)
    controlnet = new_controlnet(model.unet).to(context.device).requires_grad_(True)
    loss = NoiseLoss(context.device)

    def batch_loss() -> Tensor:
        rows = batches.rows(plan.batch)
        clean = batches.latents[rows]
        noise, timesteps = batches.noise(clean)
        hint = (edges[rows].float() / 255).expand(-1, 3, -1, -1)
        with context.autocast():
            noisy = loss.noisy(clean, noise, timesteps)
            words = model.text_encoder(batches.captions(rows))[0]
            down, middle = controlnet(noisy, timesteps, words, hint, return_dict=False)
            predicted = model.unet(
                noisy,
                timesteps,
                words,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        return loss(predicted, noise, timesteps)

    if context.compiled:
        model.unet.compile()
        controlnet.compile()
        batch_loss().backward()  # type: ignore[no-untyped-call]  # compiles while the denoiser still trains in another process
    wait_for(context.work / "diffusion")
    model.load_state_dict(load_denoiser(context).state_dict())
    controlnet.load_state_dict(new_controlnet(model.unet).state_dict())
    trainer = Trainer("edges", controlnet.parameters(), plan)
    trainer.run(batch_loss)
    with new_folder(context.work / "edges") as folder:
        controlnet.save_pretrained(folder)


def _set_scale(unet: nn.Module, scale: float) -> None:
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("outline", scale)


def _data(context: Context, plan: Plan, stage: str, nouns: list[Nouns]) -> tuple[Scenes, Batches]:
    """Prepare scenes while the denoiser still trains; the outline stage's latents are outlined."""
    wait_for(context.work / "autoencoder")
    wait_for(context.work / "tokenizer" / "tokenizer_config.json")
    scenes = sample_scenes(plan.scenes, context.generator(stage))
    writer = CaptionWriter(context, load_tokenizer(context))
    written = writer.start(scenes, _CAPTIONS_EACH, nouns)
    vae = load_autoencoder(context.work).to(context.device)
    return scenes, Batches(
        latents=encode(context, vae, scenes, fill=0.0 if stage == "outline" else 1.0),
        tokens=writer.collect(written, context.device),
        unconditional=writer.unconditional(context.device),
        generator=context.generator(stage, context.device),
    )
