"""Tiny checkpoints of the true architectures, with random weights, made in seconds on a CPU.

Every family keeps its own blocks, text encoders, conditions, scheduler and prediction type; the
native size is 64 pixels. One seed gives the same weights on every machine: no weight depends on
the result of a float computation, and scales are powers of two.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.tools.tiny_families import (
    NATIVE_PIXELS,
    SCALING_FACTORS,
    SCHEDULERS,
    SIDECARS,
    TEXT_WIDTHS,
    UNETS,
    architecture,
    text_indices,
)


def build_checkpoint(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a whole Diffusers folder in safetensors, fp32."""
    parts: dict[str, Any] = {
        "vae": vae(family, seed),
        "unet": unet(family, seed),
        "scheduler": scheduler(family),
        "tokenizer": None,
        "text_encoder": None,
    }
    for index in text_indices(family):
        suffix = "_2" if index else ""
        parts[f"tokenizer{suffix}"] = tokenizer(family, index)
        parts[f"text_encoder{suffix}"] = text_encoder(family, index, seed)
    pipeline(family, parts).save_pretrained(folder)
    if family in SIDECARS:
        (folder / "igi.json").write_text(json.dumps(SIDECARS[family]))
    return finish(folder)


def build_vae(folder: Path, family: str, seed: int = 0) -> Path:
    """A VAE alone; with the seed of a checkpoint, the same as in it."""
    vae(family, seed).save_pretrained(folder)
    return finish(folder)


def build_controlnet(folder: Path, family: str, seed: int = 0) -> Path:
    """A ControlNet that shows: the layers that are zero before training are drawn as well."""
    with seeded(family, "controlnet", seed):
        controlnet = diffusers.ControlNetModel.from_unet(
            unet(family, seed),
            conditioning_embedding_out_channels=(4, 4, 8, 8),
            load_weights_from_unet=False,
        )
        into_the_unet = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        embedding = controlnet.controlnet_cond_embedding
        for layer in (*into_the_unet, embedding.conv_out):
            layer.reset_parameters()
            scale(layer, 2)
        scale(embedding, 4)
    controlnet.save_pretrained(folder)
    return finish(folder)


def build_safety_checker(folder: Path, flags: bool = False, seed: int = 0) -> Path:
    """A safety checker and its feature extractor in one folder; it flags all pictures or none."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32}
    vision |= {"num_attention_heads": 2, "patch_size": 16}
    with seeded("any", "safety_checker", seed), torch.no_grad():
        config = CLIPConfig(vision_config=vision, projection_dim=16)
        checker = StableDiffusionSafetyChecker(config)
        torch.nn.init.normal_(checker.concept_embeds)
        torch.nn.init.normal_(checker.special_care_embeds)
        # A picture is flagged where its cosine with a concept is above this.
        checker.concept_embeds_weights.fill_(-1.5 if flags else 1.5)
        checker.special_care_embeds_weights.fill_(1.5)
    checker.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return finish(folder)


@contextmanager
def seeded(family: str, part: str, seed: int) -> Iterator[None]:
    """Draw from a generator of its own for each part, and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{family}/{part}/{seed}".encode()))
        yield


@torch.no_grad()
def scale(module: torch.nn.Module, factor: float) -> None:
    """Make a layer's output larger; a power of two keeps every bit of the mantissa."""
    for parameter in module.parameters():
        parameter.mul_(factor)


def tokenizer(family: str, index: int) -> CLIPTokenizer:
    """CLIP's own without merges: a token for every byte, at most 77 of them."""
    characters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    characters += [chr(256 + each) for each in range(256 - len(characters))]
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: each for each, token in enumerate(tokens)}
    pad = "<|endoftext|>" if from_openai(family, index) else "!"
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)


def from_openai(family: str, index: int) -> bool:
    """OpenAI's CLIP reads for SD1.5 and first for SDXL, OpenCLIP for the others."""
    return index == 0 and family != "sd21"


def text_encoder(family: str, index: int, seed: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder of three layers; the second one of a pipeline projects."""
    width = TEXT_WIDTHS[architecture(family)][-1 if index else 0]
    config = CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu" if from_openai(family, index) else "gelu",
    )
    with seeded(family, f"text_encoder_{index}", seed):
        encoder = (CLIPTextModelWithProjection if index else CLIPTextModel)(config).eval()
    # Only training makes tokens weigh more than positions; without it all prompts look alike.
    embeddings = encoder.get_submodule("text_model.embeddings" if index else "embeddings")
    scale(embeddings.token_embedding, 128)
    return encoder


def unet(family: str, seed: int) -> Any:
    """A denoiser whose output has about the size of noise and depends on the prompt visibly."""
    with seeded(family, "unet", seed):
        denoiser = diffusers.UNet2DConditionModel(
            sample_size=NATIVE_PIXELS // 8,
            cross_attention_dim=sum(TEXT_WIDTHS[architecture(family)]),
            layers_per_block=2,
            norm_num_groups=4,
            **UNETS[architecture(family)],
        )
    scale(denoiser.conv_out, 4)
    for name, module in denoiser.named_modules():
        if name.endswith(("attn2.to_v", "attn2.to_out.0")):
            scale(module, 4)
    return denoiser.eval()


def vae(family: str, seed: int) -> Any:
    """A VAE whose pictures are neither grey nor clipped, and whose encoding is nearly certain."""
    with seeded(family, "vae", seed):
        autoencoder = diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=NATIVE_PIXELS,
            scaling_factor=SCALING_FACTORS[architecture(family)],
            force_upcast=family.startswith("sdxl"),
        )
    scale(autoencoder.decoder.conv_out, 2)
    with torch.no_grad():
        autoencoder.quant_conv.weight[:4].mul_(16)  # the mean: as large as noise once scaled
        autoencoder.quant_conv.bias[4:].sub_(8)  # the logarithm of the variance
    return autoencoder.eval()


def scheduler(family: str) -> Any:
    name, settings = SCHEDULERS[family]
    return getattr(diffusers, name)(**settings)


def pipeline(family: str, parts: dict[str, Any]) -> Any:
    """The pipeline class that a checkpoint of this family names in its model_index.json."""
    match architecture(family):
        case "sdxl":
            return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
        case "sdxl_refiner":
            return diffusers.StableDiffusionXLImg2ImgPipeline(
                **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
            )
    unchecked = {"safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionPipeline(**parts, **unchecked, requires_safety_checker=False)


def finish(folder: Path) -> Path:
    """Files as published checkpoints have them, where today's Transformers writes others.

    That is `text_model.` before the names of the first text encoder's tensors (Transformers 5.6
    dropped it), and the tokenizer's vocabulary and merges as files of their own.
    """
    for weights in folder.rglob("*.safetensors"):
        prefix = "text_model." if weights.parent.name == "text_encoder" else ""
        tensors = {prefix + name: tensor.clone() for name, tensor in load_file(weights).items()}
        save_aligned(tensors, weights)
    for tokens in folder.glob("tokenizer*"):
        model = json.loads((tokens / "tokenizer.json").read_text())["model"]
        (tokens / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        (tokens / "merges.txt").write_text("#version: 0.2\n")
    return folder


def save_aligned(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write fp32 safetensors with every tensor on a boundary of 16 bytes, where its size allows.

    Weights are often used where the file is mapped, and a CPU's matrix products round otherwise
    off those boundaries (seen: 1e-5 of a picture's range, which flips a few of its bytes). So
    aligned, a copy of the weights gives the same picture as the file.
    """

    def granule(name: str) -> int:
        size = tensors[name].nbytes
        return min(size & -size, 64)

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors, key=lambda name: (-granule(name), name)):
        start, data = len(data), data + tensors[name].contiguous().numpy().tobytes()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.unlink(missing_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
