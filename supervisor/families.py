"""What a model is, told from its configurations, and which models fit together.

Pure functions of dicts; file_families.py tells the same from a single file's tensors.
Families are told by structure, not by width, so that a small model of a family counts as
one of it: SD2 projects with linear layers where SD1 has 1x1 convolutions; SDXL adds size
conditions to the time embedding; its refiner has OpenCLIP's text encoder alone.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from ipc.messages import Family
from supervisor.headers import InvalidModel

Kind = Literal["checkpoint", "vae", "lora", "controlnet"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Config = Mapping[str, Any]

LATENT_AND_MASK_CHANNELS = (4, 9)
"""In-channels of the families' UNets: latents alone, or with an inpainting mask and picture."""


class WrongKind(InvalidModel):
    """A model of one kind was named where another is needed."""


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which models fit together. None: unknown, or the model has no such thing."""

    family: Family | None = None
    class_name: str | None = None
    in_channels: int | None = None
    cross_attention_dim: int | None = None
    latent_channels: int | None = None
    scaling_factor: float | None = None
    prediction_type: str | None = None


# Diffusers folders.


def checkpoint_traits(model_index: Config, configs: Mapping[str, Config]) -> Traits:
    """`configs` holds each component's configuration by the component's name."""
    unet, vae = configs.get("unet", {}), configs.get("vae", {})
    return Traits(
        family=_folder_family(model_index, configs),
        class_name=_text(model_index, "_class_name"),
        in_channels=_integer(unet, "in_channels"),
        cross_attention_dim=_integer(unet, "cross_attention_dim"),
        latent_channels=_integer(vae, "latent_channels"),
        scaling_factor=_number(vae, "scaling_factor"),
        prediction_type=_text(configs.get("scheduler", {}), "prediction_type"),
    )


def _folder_family(model_index: Config, configs: Mapping[str, Config]) -> Family:
    class_name = _text(model_index, "_class_name") or ""
    unet = configs.get("unet", {})
    if unet.get("in_channels", 4) not in LATENT_AND_MASK_CHANNELS:
        return "other"  # depth, upscaling, instructions: classes with a UNet of their own
    if class_name.startswith("StableDiffusionXL") and unet.get("addition_embed_type"):
        return "sdxl" if configs.get("text_encoder") else "sdxl_refiner"
    if class_name.startswith(("StableDiffusion", "LatentConsistencyModel")) and _is_plain(configs):
        return "sd21" if unet.get("use_linear_projection") else "sd15"
    return "other"


def _is_plain(configs: Mapping[str, Config]) -> bool:
    """A UNet under one text encoder, without added conditions: SD1 and SD2."""
    unet = configs.get("unet", {})
    added = unet.get("addition_embed_type") or unet.get("class_embed_type")
    return bool(unet and not added and configs.get("text_encoder") and configs.get("vae"))


def module_traits(kind: Kind, config: Config) -> Traits:
    """A VAE's or ControlNet's own folder. Raises WrongKind for another kind of module."""
    class_name = _text(config, "_class_name") or "model of no known class"
    expected = {"vae": ("Autoencoder", "AsymmetricAutoencoder"), "controlnet": ("ControlNet",)}
    if not class_name.startswith(expected.get(kind, ())):
        raise WrongKind(f"it is a {class_name}, not a {spelled(kind)}")
    if kind == "vae":
        plain = class_name == "AutoencoderKL"  # others scale their latents in other ways
        return Traits(
            class_name=class_name,
            latent_channels=_integer(config, "latent_channels"),
            scaling_factor=_number(config, "scaling_factor") if plain else None,
        )
    return Traits(
        class_name=class_name,
        family=_controlnet_family(config),
        cross_attention_dim=_integer(config, "cross_attention_dim"),
    )


def _controlnet_family(config: Config) -> Family | None:
    if "cross_attention_dim" not in config:
        return None  # for a transformer
    if config.get("addition_embed_type"):
        return "sdxl"
    return "sd21" if config.get("use_linear_projection") else "sd15"


# Which models fit together.


def misfit(kind: Kind, checkpoint: Traits, other: Traits) -> str | None:
    """Why `other`, used as a `kind` (a checkpoint: as a refiner), does not fit; None: it does."""
    if kind == "checkpoint":
        fits = checkpoint.family == "sdxl" and other.family == "sdxl_refiner"
        return None if fits else "a refiner of family sdxl_refiner goes with a base of family sdxl"
    known = other.family and checkpoint.family != "other"
    if known and other.family != checkpoint.family:
        return "their families differ"
    for field, what in COMPARED.items():
        ours, theirs = getattr(checkpoint, field), getattr(other, field)
        if ours is not None and theirs is not None and ours != theirs:
            return f"{what} differ: {_with_owner(ours)} and {_with_owner(theirs)}"
    return None


def _with_owner(value: float) -> str:
    owners = {0.18215: "sd15 and sd21", 0.13025: "sdxl"}
    return f"{value} (that of {owners[value]})" if value in owners else str(value)


COMPARED = {
    "cross_attention_dim": "the widths of their text conditions",
    "latent_channels": "their numbers of latent channels",
    "scaling_factor": "the scales of their latents",
}


def spelled(kind: Kind) -> str:
    """The kind as sentences call it."""
    return {"vae": "VAE", "lora": "LoRA", "controlnet": "ControlNet"}.get(kind, kind)


def _text(config: Config, key: str) -> str | None:
    value = config.get(key)
    return value if isinstance(value, str) else None


def _integer(config: Config, key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(config: Config, key: str) -> float | None:
    value = config.get(key)
    return float(value) if isinstance(value, int | float) else None
