"""The names that LDM, SGM and OpenCLIP give their tensors, turned into those of Diffusers' and
Transformers' modules.

Pure functions of dicts of tensors; what they return are views, so that a mapped file stays on
disk. Blocks are renamed by Diffusers' own converters. Raises BrokenModel for what is missing.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders import single_file_utils as diffusers_names

from gpu_worker.folders import BrokenModel

Tensors = dict[str, torch.Tensor]
Config = Mapping[str, Any]


def unet(tensors: Tensors, config: Config) -> Tensors:
    found = _translated(diffusers_names.convert_ldm_unet_checkpoint, tensors, config)
    return _having(found, "conv_in.weight")


def vae(tensors: Tensors, config: Config) -> Tensors:
    """In LDM's layout with or without a prefix, in Diffusers', or in that of early Diffusers."""
    if any(".mid_block." in name for name in tensors):
        return {_todays(name): tensor for name, tensor in tensors.items()}
    return _translated(diffusers_names.convert_ldm_vae_checkpoint, tensors, config)


def controlnet(tensors: Tensors, config: Config) -> Tensors:
    """In LDM's layout with or without a prefix, or in Diffusers'."""
    if "difference" in tensors:
        raise BrokenModel("it holds differences to a checkpoint, not a whole ControlNet")
    found = _translated(diffusers_names.convert_controlnet_checkpoint, tensors, config)
    found |= _size_conditions(tensors)
    return _having(found, "conv_in.weight", "controlnet_cond_embedding.conv_in.weight")


def _size_conditions(tensors: Tensors) -> Tensors:
    """Those of an SDXL's ControlNet in LDM's layout, which Diffusers' converter leaves out."""
    prefix = diffusers_names.LDM_CONTROLNET_KEY
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    names = diffusers_names.DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]
    return {new: bare[old] for new, old in names.items() if old in bare}


TODAYS_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _todays(name: str) -> str:
    for old, new in TODAYS_ATTENTION.items():
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def _translated(convert: Callable[..., Any], tensors: Tensors, config: Config) -> Tensors:
    """A converter raises KeyError, or gives None, for what is missing."""
    try:
        found = convert(dict(tensors), config)
    except KeyError as missing:
        raise BrokenModel(f"it lacks {missing.args[0]}") from None
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _having(tensors: Tensors, *names: str) -> Tensors:
    """The tensors, once it is known that these are there and are a convolution's."""
    for name in names:
        if name not in tensors or tensors[name].ndim != 4:
            raise BrokenModel(f"it lacks {name}")
    return tensors


OPEN_CLIP = [
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
]
IN_PROJECTION = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")


def text_encoder(tensors: Tensors, prefix: str, layers: int, projects: bool) -> Tensors:
    """From Transformers' layout or OpenCLIP's, both below `prefix`: its first `layers` layers.

    SD2's last layer and its projection are in the file and unused. Left out, too, is what is
    no weight.
    """
    own, open_clip = f"{prefix}transformer.", f"{prefix}model."
    if any(name.startswith(open_clip) for name in tensors):
        found = _from_open_clip({name.removeprefix(open_clip): t for name, t in tensors.items()})
    else:
        found = {name.removeprefix(own): tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if tensor.is_floating_point() and tensor.ndim and not _is_beyond(name, layers)
        if projects or name != "text_projection.weight"
    }


def _is_beyond(name: str, layers: int) -> bool:
    match = LAYER.match(name)
    return match is not None and int(match[1]) >= layers


def _from_open_clip(tensors: Tensors) -> Tensors:
    """Query, key and value are one tensor there, and the projection is transposed."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if match := IN_PROJECTION.fullmatch(name):
            start = f"text_model.encoder.layers.{match[1]}.self_attn."
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{start}{letter}_proj.{match[2]}"] = third
        elif name == "text_projection":
            found["text_projection.weight"] = tensor.T
        else:
            for pattern, replacement in OPEN_CLIP:
                name = re.sub(pattern, replacement, name)
            found[name] = tensor
    return found
