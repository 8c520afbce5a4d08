"""What a model is, told from its configurations or from the tensors in its header.

Pure functions of dicts. Families are told by structure, not by width, so that a small
model of a family counts as one of it: SD2 projects with linear layers where SD1 has
1x1 convolutions; SDXL adds size conditions to the time embedding; its refiner has
OpenCLIP's text encoder alone.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, assert_never, get_args

import msgspec

from ipc.messages import Family
from supervisor.headers import InvalidModel, Tensor

Kind = Literal["checkpoint", "vae", "lora", "controlnet"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]

PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
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


# Single files.


def file_kind(tensors: Tensors) -> Kind | None:
    """What a single file is, by its tensors' names; None: nothing that is known here."""
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return "checkpoint"
    if any(LORA_PART.search(name) for name in tensors):
        return "lora"
    if any("input_hint_block." in n or "controlnet_cond_embedding." in n for n in tensors):
        return "controlnet"
    if any(_without_vae_prefix(name) == "decoder.conv_in.weight" for name in tensors):
        return "vae"
    return None


def file_traits(kind: Kind, tensors: Tensors, metadata: Mapping[str, str]) -> Traits:
    """Raises WrongKind, and InvalidModel when the file is not a whole model."""
    found = file_kind(tensors)
    if found is None:
        raise InvalidModel(f"its tensors are not those of a {spelled(kind)} in a known layout")
    if found != kind:
        raise WrongKind(f"it is a {spelled(found)}, not a {spelled(kind)}")
    match kind:
        case "checkpoint":
            return _checkpoint_file_traits(tensors, metadata)
        case "vae":
            return Traits(class_name="AutoencoderKL", latent_channels=_vae_channels(tensors))
        case "controlnet":
            family = "sdxl" if _has_added_conditions(tensors) else _plain_family(tensors)
            return Traits(
                class_name="ControlNetModel", family=family, cross_attention_dim=_cross(tensors)
            )
        case "lora":
            return Traits(family=_lora_family(tensors), cross_attention_dim=_lora_cross(tensors))
        case _ as never:
            assert_never(never)


def _checkpoint_file_traits(tensors: Tensors, metadata: Mapping[str, str]) -> Traits:
    family = _checkpoint_file_family(tensors)
    parts = {"text encoder": TEXT_ENCODERS, "VAE": ("first_stage_model.decoder.",)}
    for part, prefixes in parts.items():
        if family != "other" and not any(name.startswith(prefixes) for name in tensors):
            raise InvalidModel(f"it holds no {part}")
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    prediction_type = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in tensors:  # an empty tensor that SDXL trainers leave as a mark
        prediction_type = "v_prediction"
    return Traits(
        family=family,
        in_channels=first.shape[1] if first and len(first.shape) == 4 else None,
        cross_attention_dim=_cross(tensors),
        latent_channels=_vae_channels(tensors),
        prediction_type=prediction_type,
    )


TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.")


ADDED: dict[str, Family] = {
    "conditioner.embedders.0.transformer.": "sdxl",
    "conditioner.embedders.0.model.": "sdxl_refiner",
}
"""SDXL begins with OpenAI's text encoder, its refiner with OpenCLIP's."""


def _checkpoint_file_family(tensors: Tensors) -> Family:
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is None or first.shape[1:2] not in [(4,), (9,)] or "edm_mean" in tensors:
        return "other"
    if not _has_added_conditions(tensors):
        return _plain_family(tensors)
    for prefix, family in ADDED.items():
        if any(name.startswith(prefix) for name in tensors):
            return family
    return "other"  # unCLIP, for one


def _has_added_conditions(tensors: Tensors) -> bool:
    marks = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
    return any(name.endswith(marks) for name in tensors)


def _plain_family(tensors: Tensors) -> Family:
    return "sd21" if _projects_linearly(tensors, "proj_in.weight") else "sd15"


def _projects_linearly(tensors: Tensors, ending: str | tuple[str, ...]) -> bool:
    """The VAE's attention has `proj_out` alone, so that `proj_in` is the denoiser's."""
    return any(name.endswith(ending) and len(t.shape) == 2 for name, t in tensors.items())


def _cross(tensors: Tensors) -> int | None:
    shapes = (t.shape for name, t in tensors.items() if name.endswith("attn2.to_k.weight"))
    return next((shape[1] for shape in shapes if len(shape) == 2), None)


def _without_vae_prefix(name: str) -> str:
    return name.removeprefix("first_stage_model.").removeprefix("vae.")


def _vae_channels(tensors: Tensors) -> int | None:
    for name, tensor in tensors.items():
        if _without_vae_prefix(name) == "decoder.conv_in.weight" and len(tensor.shape) == 4:
            return tensor.shape[1]
    return None


# LoRA: names differ between Diffusers (dots) and kohya (underscores), but not by more.

LORA_PART = re.compile(
    r"[._](lora_down|lora_A|lora\.down|to_[a-z_]*lora\.down|lora_linear_layer\.down)\b"
)
LORA_CROSS = re.compile(r"attn2_(processor_)?to_k_lora_(down|A)_")
SDXL_LORA = re.compile(
    r"^(lora_te[12]_|text_encoder_2[._])"
    r"|^lora_unet_(in|out)put_blocks_|^lora_unet_label_emb|transformer_blocks[._][1-9]"
)
UNET_LORA = ("lora_unet_", "unet.", "down_blocks.", "mid_block.", "up_blocks.")
TEXT_LORA = ("lora_te", "text_encoder.", "text_encoder_2.")
OTHER_LORA = re.compile(r"double_blocks|single_blocks|joint_blocks|joint_transformer|layers_[0-9]")


def _lora_family(tensors: Tensors) -> Family | None:
    if not any(name.startswith(UNET_LORA + TEXT_LORA) for name in tensors):
        return "other"
    if any(name.startswith("lora_unet_") and OTHER_LORA.search(name) for name in tensors):
        return "other"  # a transformer's, which kohya calls a UNet too
    if any(SDXL_LORA.search(name) for name in tensors):
        return "sdxl"
    if not any(name.startswith(UNET_LORA) for name in tensors):
        return None  # a text encoder's alone: SD1 and SD2 name theirs alike
    width = _lora_cross(tensors)
    if width in WIDTHS:
        return WIDTHS[width]
    linear = _projects_linearly(tensors, ("proj_in.lora_down.weight", "proj_in.lora_A.weight"))
    convolving = any("proj_in" in name and len(t.shape) == 4 for name, t in tensors.items())
    return "sd21" if linear else "sd15" if convolving else None


WIDTHS: dict[int | None, Family] = {768: "sd15", 1024: "sd21", 1280: "sdxl_refiner", 2048: "sdxl"}
"""Where a LoRA's structure says nothing: the text width of its cross attention."""


def _lora_cross(tensors: Tensors) -> int | None:
    for name, tensor in tensors.items():
        if LORA_CROSS.search(name.replace(".", "_")) and len(tensor.shape) == 2:
            return tensor.shape[1]
    return None


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
