"""LoRA files as low-rank factors by module and layer, whichever layout they are in.

Diffusers' own converters read the names: its layouts (peft, and the two before it) and
kohya's, whose SDXL files name the layers as SDXL's first implementation did.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from gpu_worker.failures import Refusal
from ipc.messages import Model

MODULES = ("unet", "text_encoder", "text_encoder_2")
METADATA_KEY = "lora_adapter_metadata"
"""Where Diffusers writes peft's configuration into a file's header."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
GB = 2**30
ALIGNED = 16

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's change, `scale · up · down`, as in the file: on the host, in its dtype.

    `down` is [rank, inputs, …], `up` is [outputs, rank, …]; `scale` is alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, and inputs times the size of the kernel."""
        return self.up.shape[0], self.down[0].numel()

    @property
    def bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def add_to(self, total: torch.Tensor, scale: float) -> None:
        """Add scale times this change to a float32 weight of `shape`, where that lies."""
        # To the device first: many small conversions on a busy host take milliseconds each.
        there = [each.to(total.device, non_blocking=True) for each in (self.up, self.down)]
        up, down = (each.float().flatten(1) for each in there)
        total.view(self.shape).addmm_(up, down, alpha=self.scale * scale)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA in host memory. `identity` is another one when the file has changed."""

    name: str
    identity: str
    parts: Mapping[str, Mapping[str, Factors]]
    """Factors by module (unet, text_encoder, text_encoder_2) and layer."""

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self._factors)

    def in_one_piece(self, pinned: bool) -> "Lora":
        """The same factors side by side in one piece of memory; pinned, a GPU reads it at the
        bus's speed while nobody waits."""
        size = sum(_padded(each.down) + _padded(each.up) for each in self._factors)
        room, begin = torch.empty(size, dtype=torch.uint8, pin_memory=pinned), 0

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal begin
            place = room[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            begin += _padded(tensor)
            return place.copy_(tensor)

        return replace(self, parts={
            module: {layer: replace(each, down=moved(each.down), up=moved(each.up))
                     for layer, each in layers.items()}
            for module, layers in self.parts.items()
        })  # fmt: skip

    @property
    def _factors(self) -> list[Factors]:
        return [each for layers in self.parts.values() for each in layers.values()]


def _padded(tensor: torch.Tensor) -> int:
    """Bytes up to where a tensor of any type may begin."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


@dataclass
class LoraFiles:
    """LoRAs that were read, the least recently used dropped above `max_bytes`. Pinned ones take
    up to twice that: torch rounds pieces up to a power of two and keeps them for the next."""

    max_bytes: int = GB
    _held: OrderedDict[str, Lora] = field(default_factory=OrderedDict)

    def get(self, model: Model, unet: Any) -> Lora:
        """The LoRA of a file, for checkpoints with this denoiser. Raises Refusal, OSError."""
        key = f"{identified(model.path)}:{_named_as_first(unet)}"
        lora = self._held.pop(key, None) or load(model, unet)
        self._held[key] = lora
        while self.bytes > self.max_bytes and len(self._held) > 1:
            self._held.popitem(last=False)
        return lora

    @property
    def bytes(self) -> int:
        return sum(lora.bytes for lora in self._held.values())


def identified(path: str) -> str:
    """A file by its path and what changes when it is replaced."""
    status = os.stat(path)
    return f"{path}:{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def load(model: Model, unet: Any) -> Lora:
    """Read a LoRA for checkpoints with this denoiser. Raises Refusal, OSError.

    `unet` tells how many layers its blocks hold, by which kohya's names for SDXL are
    counted; nothing is checked against its weights yet.
    """
    identity = identified(model.path)
    try:
        tensors, metadata = _read(model.path)
        return pinned(Lora(model.name, identity, _parts(tensors, metadata, unet)))
    except (SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        # Diffusers' converters fail in these ways where names are not what they expect.
        reason = str(error) if isinstance(error, Unreadable) else "its layout is not a known one"
        detail = f"cannot read the LoRA {model.name}: {reason}"
        raise Refusal("invalid_model", detail, "loras") from error


def pinned(lora: Lora) -> Lora:
    """In pinned memory where there is a GPU and the host does not refuse: it works all the same
    without, some milliseconds later."""
    try:
        return lora.in_one_piece(pinned=True) if torch.cuda.is_available() else lora
    except RuntimeError:
        return lora


def _named_as_first(unet: Any) -> int | None:
    """Layers per block, where kohya counts by them: on denoisers of SDXL. Raises Refusal."""
    if type(unet).__name__ != "UNet2DConditionModel":
        detail = "cannot use a LoRA here: Stable Diffusion 1, 2 and XL take them"
        raise Refusal("not_supported", detail, "loras")
    return unet.config.layers_per_block if unet.config.addition_embed_type else None


class Unreadable(ValueError):
    """Says what in a file is not understood."""


def _read(path: str) -> tuple[Tensors, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, json.loads(header.get(METADATA_KEY, "{}"))


def _parts(
    tensors: Tensors, metadata: Mapping[str, Any], unet: Any
) -> dict[str, dict[str, Factors]]:
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in tensors):
        raise Unreadable("DoRA is not supported")
    alphas = _alphas(tensors)
    # A dictionary given to it is neither a path nor a download.
    named, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(
        dict(tensors), unet_config=unet.config if _named_as_first(unet) else None
    )
    by_module: dict[str, Tensors] = {}
    for name, tensor in named.items():
        module, _, rest = name.partition(".")
        if module not in MODULES:
            raise Unreadable(f"{name} is of no module of Stable Diffusion")
        by_module.setdefault(module, {})[rest] = tensor
    if not by_module:
        raise Unreadable("it holds nothing")
    return {
        module: _factors(_as_peft(module, part), alphas, _of_module(metadata, module))
        for module, part in by_module.items()
    }


def _alphas(tensors: Tensors) -> dict[int, float]:
    """Kohya's alphas, by the `id` of the factor `down` they belong to.

    By the tensor, since converting renames layers; and Diffusers, by name, gives layers
    of attention the commonest alpha of the file instead of their own.
    """
    found = {}
    for name, tensor in tensors.items():
        down = tensors.get(f"{name.removesuffix('.alpha')}.lora_down.weight")
        if name.endswith(".alpha") and down is not None:
            found[id(down)] = float(tensor)
    return found


def _as_peft(module: str, tensors: Tensors) -> Tensors:
    """Names as peft has them: `<layer>.lora_A.weight`. As Diffusers' loaders do it."""
    if module != "unet":
        converted: Tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
    elif any("lora_A" in name for name in tensors):
        converted = tensors
    else:
        converted = convert_unet_state_dict_to_peft(tensors)
    return converted


def _of_module(metadata: Mapping[str, Any], module: str) -> dict[str, Any]:
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): value
        for name, value in metadata.items()
        if name.startswith(prefix)
    }


def _factors(
    tensors: Tensors, alphas: Mapping[int, float], config: Mapping[str, Any]
) -> dict[str, Factors]:
    strange = [name for name in tensors if not name.endswith((DOWN, UP))]
    if strange:
        raise Unreadable(f"{strange[0]} is not part of a LoRA")
    found = {}
    for layer in {name.removesuffix(DOWN).removesuffix(UP): None for name in tensors}:
        down, up = tensors[layer + DOWN], tensors[layer + UP]
        if down.ndim < 2 or up.ndim < 2 or up[0].numel() != down.shape[0]:
            raise Unreadable(f"the ranks of {layer} differ")
        rank = down.shape[0]
        found[layer] = Factors(down, up, _scale(layer, rank, alphas.get(id(down)), config))
    return found


def _scale(layer: str, rank: int, alpha: float | None, config: Mapping[str, Any]) -> float:
    """alpha / rank; peft's configuration in the header may set alpha, or rank's root below."""
    if alpha is None and config:
        if config.get("use_dora"):
            raise Unreadable("DoRA is not supported")
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return (rank if alpha is None else alpha) / divisor
