"""Diffusers folders written as the single files that checkpoints are traded in.

Names, shapes and left-overs are those of the published files: `v1-5-pruned.safetensors`,
`v2-1_768-ema-pruned.safetensors`, `sd_xl_base_1.0.safetensors`, `sd_xl_refiner_1.0.safetensors`,
`vae-ft-mse-840000-ema-pruned.safetensors`, `control_v11p_sd15_canny.safetensors`. This goes
the way from Diffusers to LDM, which the server's own code never goes.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tools.tiny_families import architecture

Tensors = dict[str, torch.Tensor]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
ENCODERS = {
    # By family: the part, its prefix, and whether it is OpenCLIP's.
    "sd15": [("text_encoder", "cond_stage_model.transformer.", False)],
    "sd21": [("text_encoder", "cond_stage_model.model.", True)],
    "sdxl": [
        ("text_encoder", "conditioner.embedders.0.transformer.", False),
        ("text_encoder_2", "conditioner.embedders.1.model.", True),
    ],
    "sdxl_refiner": [("text_encoder_2", "conditioner.embedders.0.model.", True)],
}


def write_checkpoint(folder: Path, family: str, path: Path, more: Tensors | None = None) -> Path:
    """A whole Diffusers folder as one file; `more` tensors lie beside the model's."""
    family = architecture(family)
    tensors = prefixed(UNET, unet(weights(folder, "unet")))
    tensors |= prefixed(VAE, vae(weights(folder, "vae")))
    for part, prefix, is_open_clip in ENCODERS[family]:
        encoder = open_clip if is_open_clip else clip
        tensors |= prefixed(prefix, encoder(weights(folder, part)))
    return write(path, tensors | left_overs(family) | (more or {}))


def write_vae(folder: Path, path: Path, layout: str = "ldm") -> Path:
    """`layout`: ldm, ldm with a checkpoint's prefix, diffusers, or an early Diffusers' names."""
    tensors = weights(folder)
    match layout:
        case "ldm":
            tensors = vae(tensors) | {"loss.logvar": torch.zeros(1)}
        case "prefixed":
            tensors = prefixed(VAE, vae(tensors))
        case "early":
            tensors = renamed(tensors, EARLY_ATTENTION)
    return write(path, tensors)


def write_controlnet(folder: Path, path: Path, layout: str = "ldm") -> Path:
    """`layout`: ldm with `control_model.` before each name, bare without it, or diffusers."""
    tensors = weights(folder)
    match layout:
        case "ldm":
            tensors = prefixed("control_model.", controlnet(tensors))
        case "bare":
            tensors = controlnet(tensors)
    return write(path, tensors)


def copy_configs(folder: Path, configs: Path) -> Path:
    """What a family's folder holds besides its weights."""
    ignored = shutil.ignore_patterns("*.safetensors", "igi.json")
    shutil.copytree(folder, configs, ignore=ignored, dirs_exist_ok=True)
    return configs


def write(path: Path, tensors: Tensors) -> Path:
    """A file whose tensors begin where the library puts them: on boundaries of 8 bytes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def weights(folder: Path, part: str = "") -> Tensors:
    """A part's tensors, in 32 bits as in its file."""
    found: Tensors = {}
    for file in sorted((folder / part).glob("*.safetensors")):
        found |= load_file(file)
    return found


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(tensors: Tensors, patterns: Iterable[tuple[str, str]]) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def left_overs(family: str) -> Tensors:
    """What published checkpoints hold and no pipeline uses."""
    kept = {
        "model_ema.decay": torch.ones(()),
        "model_ema.num_updates": torch.ones((), dtype=torch.int),
    }
    if family.startswith("sdxl"):
        return {"denoiser.sigmas": torch.ones(1000)}
    return kept | {name: torch.ones(1000) for name in ("betas", "alphas_cumprod")}


# The UNet and the ControlNet.

RESNET = [
    (r"\bnorm1\b", "in_layers.0"),
    (r"\bconv1\b", "in_layers.2"),
    (r"\bnorm2\b", "out_layers.0"),
    (r"\bconv2\b", "out_layers.3"),
    (r"\btime_emb_proj\b", "emb_layers.1"),
    (r"\bconv_shortcut\b", "skip_connection"),
]
ENDS = [
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^controlnet_mid_block\.", "middle_block_out.0."),
    (r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0."),
    (r"^controlnet_cond_embedding\.conv_in\.", "input_hint_block.0."),
    (r"^controlnet_cond_embedding\.conv_out\.", "input_hint_block.14."),
]


def unet(tensors: Tensors) -> Tensors:
    """Blocks are counted through in LDM: each block of a level, then its change of size."""
    deepest = {name.split(".")[1] for name in tensors if name.startswith("down_blocks.")}
    found: Tensors = {}
    for name, tensor in tensors.items():
        found[_block(name, tensors, len(deepest))] = tensor
    return renamed(found, ENDS)


def controlnet(tensors: Tensors) -> Tensors:
    embedding = r"^controlnet_cond_embedding\.blocks\.(\d+)\."
    found: Tensors = {}
    for name, tensor in unet(tensors).items():
        if match := re.match(embedding, name):
            name = f"input_hint_block.{2 * int(match[1]) + 2}." + name[match.end() :]
        found[name] = tensor
    return found


def _block(name: str, tensors: Tensors, levels: int) -> str:
    """One tensor's name among the input, middle or output blocks."""
    level = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if level:
        return _level_block(level, tensors)
    middle = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if middle is None:
        return name
    kind, index, rest = middle.groups()
    place = 2 * int(index) if kind == "resnets" else 1
    return f"middle_block.{place}." + (_resnet(rest) if kind == "resnets" else rest)


def _level_block(match: "re.Match[str]", tensors: Tensors) -> str:
    side, level, kind, index, rest = match.groups()
    per_level = 3  # two layers and a change of size going down; three layers going up
    if side == "down":
        first = 1 + per_level * int(level)
        places = {"resnets": (int(index), 0), "attentions": (int(index), 1), "downsamplers": (2, 0)}
    else:
        first = per_level * int(level)
        attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in tensors)
        places = {"resnets": (int(index), 0), "attentions": (int(index), 1)}
        places["upsamplers"] = (2, 2 if attends else 1)
    offset, place = places[kind]
    if kind == "resnets":
        rest = _resnet(rest)
    if kind == "downsamplers":
        rest = rest.replace("conv.", "op.")
    return f"{'input' if side == 'down' else 'output'}_blocks.{first + offset}.{place}.{rest}"


def _resnet(rest: str) -> str:
    for pattern, replacement in RESNET:
        rest = re.sub(pattern, replacement, rest)
    return rest


# The VAE.

EARLY_ATTENTION = [
    (r"(\.attentions\.0)\.to_q\.", r"\1.query."),
    (r"(\.attentions\.0)\.to_k\.", r"\1.key."),
    (r"(\.attentions\.0)\.to_v\.", r"\1.value."),
    (r"(\.attentions\.0)\.to_out\.0\.", r"\1.proj_attn."),
]
VAE_NAMES = [
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
]


def vae(tensors: Tensors) -> Tensors:
    """LDM counts the decoder's levels from the top, and its attention is of 1x1 convolutions."""
    levels = len({name.split(".")[2] for name in tensors if ".up_blocks." in name})

    def turned(match: "re.Match[str]") -> str:
        return f".up_blocks.{levels - 1 - int(match[1])}."

    found: Tensors = {}
    for name, tensor in tensors.items():
        is_attention = ".attentions." in name and tensor.ndim == 2
        name = re.sub(r"\.up_blocks\.(\d)\.", turned, name)
        found[name] = tensor[..., None, None] if is_attention else tensor
    return renamed(found, VAE_NAMES)


# The text encoders.


def clip(tensors: Tensors) -> Tensors:
    """OpenAI's: as Transformers had them, with the buffer of positions that it saved then."""
    count = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
    positions = torch.arange(count)[None]
    return tensors | {"text_model.embeddings.position_ids": positions}


OPEN_CLIP = [
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
]


def open_clip(tensors: Tensors) -> Tensors:
    """Query, key and value are one tensor, the projection is transposed and always there; SD2
    leaves the last layer unused, here one of the shape of the first."""
    found = renamed(tensors, OPEN_CLIP)
    projects = "text_projection.weight" in found
    width = found["ln_final.weight"].shape[0]
    projection = found.pop("text_projection.weight", torch.ones(width, width))
    for name in [name for name in found if name.endswith(".attn.q_proj.weight")]:
        start = name.removesuffix("q_proj.weight")
        for ending in ("weight", "bias"):
            three = [found.pop(f"{start}{letter}_proj.{ending}") for letter in "qkv"]
            found[f"{start}in_proj_{ending}"] = torch.cat(three)
    if not projects:
        found |= _unused_layer(found)
    return found | {"text_projection": projection.T, "logit_scale": torch.ones(())}


def _unused_layer(tensors: Tensors) -> Tensors:
    start = "transformer.resblocks."
    count = len({name.split(".")[2] for name in tensors if name.startswith(start)})
    return {
        f"{start}{count}." + name.removeprefix(f"{start}0."): torch.ones_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith(f"{start}0.")
    }
