"""Tiny checkpoints of other architectures: flow and pixel-space models, combined pipelines.

Each builder gives a pipeline with random weights, ready to be saved to a folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.tools import tiny

LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS]
CLIP = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}


def letters() -> transformers.T5Tokenizer:
    """A T5 tokenizer that knows single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0)]
    return transformers.T5Tokenizer(vocab=pieces + [(letter, -1.0) for letter in LETTERS])


def t5() -> transformers.T5EncoderModel:
    sizes = {"vocab_size": 32, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(num_layers=2, **sizes)).eval()


def clip(projects: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        num_hidden_layers=3,
        projection_dim=32,
        **CLIP,
    )
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    encoder = kind(config).eval()
    # Only training makes tokens weigh more than positions; without it all prompts look alike.
    tiny.scale(encoder.get_input_embeddings(), 128)
    return encoder


def flow_vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
        sample_size=32,
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=tiny.tokenizer("sd15", 0),
        tokenizer_2=letters(),
        vae=flow_vae(1),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
    )


def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(projects=True),
        text_encoder_2=clip(projects=True),
        text_encoder_3=t5(),
        tokenizer=tiny.tokenizer("sd15", 0),
        tokenizer_2=tiny.tokenizer("sdxl", 1),
        tokenizer_3=letters(),
        vae=flow_vae(4),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
        ),
    )


def pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=letters(),
        text_encoder=t5(),
        vae=diffusers.AutoencoderKL(),
        scheduler=diffusers.DDIMScheduler(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            cross_attention_dim=24,
        ),
    )


def sana() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    gemma = transformers.Gemma2Config(vocab_size=len(PIECES), **heads, **sizes)
    return diffusers.SanaPipeline(
        tokenizer=transformers.GemmaTokenizer(
            vocab={piece: number for number, piece in enumerate(PIECES)}, merges=[]
        ),
        text_encoder=transformers.Gemma2Model(gemma).eval(),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def transformer_of_classes() -> Any:
    """A DiT, which draws numbered classes instead of a text."""
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        vae=diffusers.AutoencoderKL(),
        scheduler=diffusers.DDIMScheduler(),
    )


def deep_floyd() -> Any:
    """Text to pixels, without a VAE."""
    return diffusers.IFPipeline(
        tokenizer=letters(),
        text_encoder=t5(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=32,
            in_channels=3,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            sample_max_value=1.5,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def pixels() -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


def prior() -> Any:
    """From a text's embedding to a picture's; without the training's spread all are zero."""
    made = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1
    )
    torch.nn.init.ones_(made.clip_std)
    return made


def kandinsky() -> Any:
    vision = transformers.CLIPVisionConfig(
        image_size=224, patch_size=14, num_hidden_layers=2, projection_dim=32, **CLIP
    )
    return diffusers.KandinskyV22CombinedPipeline(
        unet=diffusers.UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(32, 64),
            layers_per_block=1,
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=32,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        movq=diffusers.VQModel(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        prior_prior=prior(),
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        prior_text_encoder=clip(projects=True),
        prior_tokenizer=tiny.tokenizer("sd15", 0),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=transformers.CLIPImageProcessor(),
    )


SIZE = {"width": 64, "height": 64, "prompt": "a cat", "num_inference_steps": 3}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "FluxPipeline": (flux, SIZE | {"max_sequence_length": 48}),
    "StableDiffusion3Pipeline": (
        stable_diffusion_3,
        SIZE | {"width": 32, "height": 32, "max_sequence_length": 48},
    ),
    "PixArtSigmaPipeline": (pixart, SIZE | {"use_resolution_binning": False}),
    "SanaPipeline": (
        sana,
        SIZE
        | {"use_resolution_binning": False, "max_sequence_length": 16}
        | {"complex_human_instruction": ["draw"]},
    ),
    "DiTPipeline": (transformer_of_classes, {"class_labels": [207], "num_inference_steps": 3}),
    "IFPipeline": (deep_floyd, SIZE | {"width": 32, "height": 32}),
    "DDPMPipeline": (pixels, {"num_inference_steps": 3}),
    "KandinskyV22CombinedPipeline": (kandinsky, SIZE | {"prior_num_inference_steps": 2}),
}
"""By class name: a builder, and parameters that make a small picture."""


def build(folder: Path, class_name: str, seed: int = 0) -> Path:
    """Writes the checkpoint's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CASES[class_name][0]().save_pretrained(folder)
    return folder
