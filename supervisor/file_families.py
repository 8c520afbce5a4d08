"""What a single file is, told from the names and shapes in its header.

Pure functions of dicts. Families are told by structure, as in families.py.
"""

import re
from collections.abc import Mapping
from typing import assert_never

from ipc.messages import Family
from supervisor.families import Kind, Traits, WrongKind, spelled
from supervisor.headers import InvalidModel, Tensor

Tensors = Mapping[str, Tensor]

PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}


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
