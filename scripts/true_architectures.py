"""Checkpoints of the true SD1.5 and SDXL architectures, with random weights, in seconds.

Configurations as published (stable-diffusion-v1-5, stable-diffusion-xl-base-1.0); nothing is
downloaded. Modules are built on the meta device and their weights drawn one tensor at a
time, on a GPU where there is one. For timing, random weights are as good as trained ones.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

FAMILIES = ("sd15", "sdxl")
VOCABULARY = 49408
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAES = {
    "sd15": VAE | {"sample_size": 512, "scaling_factor": 0.18215, "force_upcast": False},
    "sdxl": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
}
IDS = {"vocab_size": VOCABULARY, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
CLIP_L = IDS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPENCLIP_BIG_G = IDS | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
INDICES: Mapping[str, dict[str, Any]] = {
    "sd15": {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"],
    },
    "sdxl": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
}
COMMON_INDEX = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def write_checkpoint(folder: Path, family: str, seed: int, device: str) -> Path:
    """A whole Diffusers folder, fp16 safetensors: 2.1 GB for sd15, 6.9 GB for sdxl."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        modules: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**UNETS[family]),
            "vae": diffusers.AutoencoderKL(**VAES[family]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        }
        if family == "sdxl":
            second = CLIPTextConfig(**OPENCLIP_BIG_G)
            modules["text_encoder_2"] = CLIPTextModelWithProjection(second)
    for name, module in modules.items():
        write_module(folder / name, module, generator)
    write_scheduler(folder / "scheduler", family)
    tokenizer("<|endoftext|>").save_pretrained(folder / "tokenizer")
    if family == "sdxl":
        tokenizer("!").save_pretrained(folder / "tokenizer_2")
    index = {"_diffusers_version": diffusers.__version__} | COMMON_INDEX | INDICES[family]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_scheduler(folder: Path, family: str) -> None:
    plain = {"skip_prk_steps": True, "set_alpha_to_one": False} if family == "sd15" else {}
    kind = getattr(diffusers, INDICES[family]["scheduler"][1])
    kind(**BETAS, **plain).save_config(folder)


def write_module(folder: Path, module: Any, generator: torch.Generator) -> None:
    """A module's configuration and drawn weights; `module` itself is on the meta device."""
    drawn = {name: draw(name, tensor, generator) for name, tensor in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module, diffusers.ModelMixin):
        module.save_config(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
    else:
        module.config.save_pretrained(folder)
        file = folder / "model.safetensors"
        if type(module) is CLIPTextModel:  # files have a prefix that Transformers 5.6 dropped
            drawn = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in drawn.items()}
    save_file(drawn, file, metadata={"format": "pt"})


def draw(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor in fp16 on the host, spread as PyTorch initialises: never all zero or one."""
    device = generator.device
    values = torch.randn(like.shape, generator=generator, device=device, dtype=torch.float16)
    if "embedding.weight" in name or like.dim() < 2:
        is_norm = like.dim() == 1 and name.endswith("weight")
        values = values * 0.02 + (1.0 if is_norm else 0.0)
    else:
        values = values / math.sqrt(3 * like[0].numel())
    return values.cpu()


def tokenizer(pad: str) -> CLIPTokenizer:
    """As many tokens as CLIP's own and the same marks, but no merges: a token for every byte."""
    characters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    characters += [chr(256 + each) for each in range(256 - len(characters))]
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    tokens += [f"unused{number}</w>" for number in range(VOCABULARY - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)


def write_variant(source: Path, folder: Path, number: int) -> Path:
    """A copy of a checkpoint, files of its own, whose last UNet layer is another one."""
    shutil.copytree(source, folder)
    file = next((folder / "unet").glob("*.safetensors"))
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(length))["conv_out.weight"]["data_offsets"]
    words = np.memmap(file, np.uint32, "r+", 8 + length + begin, ((end - begin) // 4,))
    words[:] = np.roll(words, number)
    words.flush()
    return folder
