"""Stock pipelines with tiny random weights, made in memory: SD1.5, SD2.1 and SDXL.

The architectures are those of the families in small: as many blocks, attention at the
same places, the same kinds of text encoders. Weights depend on the seed alone.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH = 32
"""Width of the text encoders, in channels."""


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer with no merges: a token per letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    if pad not in words:
        words.append(pad)
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


def _text_config(tokens: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    values = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "projection_dim": WIDTH,
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    return CLIPTextConfig(**(values | changes))


def _unet(**changes: Any) -> UNet2DConditionModel:
    values: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(values | changes))


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=4,
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sd15(seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokens = tokenizer()
    return _stable_diffusion(
        tokens,
        CLIPTextModel(_text_config(tokens)),
        _unet(),
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    )


def sd21(seed: int = 0) -> StableDiffusionPipeline:
    """SD2.1: v-prediction, linear projections, another activation and padding token."""
    torch.manual_seed(seed)
    tokens = tokenizer(pad="!")
    return _stable_diffusion(
        tokens,
        CLIPTextModel(_text_config(tokens, hidden_act="gelu")),
        _unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        DDIMScheduler(
            **BETAS,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


def _stable_diffusion(
    tokens: CLIPTokenizer, text_encoder: CLIPTextModel, unet: Any, scheduler: Any
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokens,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    first, second = tokenizer(), tokenizer(pad="!")
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(first)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, hidden_act="gelu")).eval(),
        tokenizer=first,
        tokenizer_2=second,
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            cross_attention_dim=2 * WIDTH,
        ).eval(),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


FAMILIES = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}


def picture(pipe: Any, seed: int = 7, **parameters: Any) -> torch.Tensor:
    """Float picture of one call, as [channel, height, width] values from 0 to 1."""
    values: dict[str, Any] = {"num_inference_steps": 3, "width": 32, "height": 32}
    if "prompt_embeds" not in parameters:
        values["prompt"] = "a red fox"
    values |= parameters
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        return pipe(generator=generator, output_type="pt", **values).images[0]
