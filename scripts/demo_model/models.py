"""The networks' shapes: Stable Diffusion 1.5's classes, a hundred times smaller."""

from pathlib import Path
from typing import Final

from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.demo_model.tokenizer import MAX_TOKENS
from scripts.demo_model.world import NATIVE_SIZE

SCALING_FACTOR: Final = 0.18215
"""Stable Diffusion's own; `autoencoder.normalise_latents` makes the latents fit it."""
_TEXT_WIDTH: Final = 128


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained VAE: eightfold reduction, four latent channels, 3.4 M parameters."""
    return AutoencoderKL(
        sample_size=NATIVE_SIZE,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=16,
        scaling_factor=SCALING_FACTOR,
    )


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet for 16x16 latents, 7.1 M parameters; heads are 24 to 32 wide."""
    return UNet2DConditionModel(
        sample_size=NATIVE_SIZE // 8,
        block_out_channels=(96, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,  # in this class the number of heads, whatever its name says
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder of four layers, 0.9 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=4 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet that starts as a copy of the UNet's encoder, 3 M parameters."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64, 96))


def noise_schedule() -> DDIMScheduler:
    """Return Stable Diffusion 1.5's schedule, which its other schedulers can be made from."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def load_autoencoder(work: Path) -> AutoencoderKL:
    """Load the trained VAE of a work folder."""
    return AutoencoderKL.from_pretrained(work / "autoencoder")
