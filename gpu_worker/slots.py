"""Modules with fixed storage: another checkpoint of the same architecture takes a module's
weights over in place, so that captured graphs and compiled code stay valid.

Knows modules, names of weights and tensors; nothing of jobs or files.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from diffusers import AutoencoderKL, ControlNetModel, ModelMixin, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.transfer import fill, settle

Weights = Mapping[str, torch.Tensor]

# Those whose skeleton, filled, was compared with what from_pretrained gives.
BUILT_HERE = (
    AutoencoderKL,
    ControlNetModel,
    UNet2DConditionModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
# Settings that say where a model came from, not what it is.
PROVENANCE = frozenset({"transformers_version", "torch_dtype", "dtype", "architectures"})
# What Diffusers called the parts of a VAE's attention in old files.
OLD_ATTENTION = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}
# Transformers 5.6 took it off CLIPTextModel's names; files have it.
TEXT_PREFIX = "text_model."


class DoesNotFit(Exception):
    """Weights are not those of this architecture."""


def signature(kind: type[Any], config: Mapping[str, Any], dtype: torch.dtype) -> Hashable:
    """Equal for models that can take each other's place in a module."""
    told = {name: value for name, value in config.items()
            if name not in PROVENANCE and not name.startswith("_")}  # fmt: skip
    return (kind, tuple(sorted((name, str(value)) for name, value in told.items())), dtype)


def skeleton(
    kind: type[Any], config: Any, dtype: torch.dtype, device: torch.device
) -> nn.Module | None:
    """A module in evaluation mode with storage for weights, nothing in it yet; None for
    kinds that only from_pretrained can build.

    `config` is a dictionary for Diffusers' models, a configuration object for Transformers'.
    Initialising an SDXL UNet takes 17 s; this does not.
    """
    if kind not in BUILT_HERE:
        return None
    with accelerate.init_empty_weights(include_buffers=False):
        module: nn.Module = (
            kind.from_config(config) if issubclass(kind, ModelMixin) else kind(config)
        )
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                storage = torch.empty(parameter.shape, dtype=dtype, device=device)
                part._parameters[name] = nn.Parameter(storage, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module.eval()


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Convolutions' weights lie so in memory from now on; a later exchange keeps that.

    Those of 1 x 1 are contiguous in any format, and `contiguous` leaves their strides alone, by
    which inductor lays a convolution's results out: so `to`.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=memory_format)


def exchange(module: nn.Module, weights: Weights) -> None:
    """The module's weights become these, in place. Raises DoesNotFit before any is written."""
    pairs = list(places(module, weights))
    with torch.no_grad():
        fill(pairs)
    settle(place.device for place, _ in pairs)


def places(module: nn.Module, weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each of a module's tensors with the one to be put there. Raises DoesNotFit.

    Tensors that two names share need one of the names; weights of no place are left over.
    """
    missing: dict[int, str] = {}
    found: set[int] = set()
    for name, place in module.state_dict(keep_vars=True).items():
        source = lookup(weights, name)
        if id(place) in found:
            continue
        if source is None:
            missing[id(place)] = name
            continue
        if source.shape != place.shape:
            raise DoesNotFit(f"{name} is {list(source.shape)} and should be {list(place.shape)}")
        found.add(id(place))
        yield place, source
    for place_id, name in missing.items():
        if place_id not in found:
            raise DoesNotFit(f"{name} is missing")


def lookup(weights: Weights, name: str) -> torch.Tensor | None:
    """A module's tensor under the name it has in a file, old or new."""
    for each in _spellings(name):
        if each in weights:
            return weights[each]
    return None


def _spellings(name: str) -> Iterable[str]:
    yield name
    yield TEXT_PREFIX + name
    if name.startswith(TEXT_PREFIX):
        yield name.removeprefix(TEXT_PREFIX)
    for new, old in OLD_ATTENTION.items():
        if new in name:
            yield name.replace(new, old)


class Spares:
    """Modules whose checkpoints were dropped, kept for others of their architecture."""

    def __init__(self) -> None:
        self._held: dict[Hashable, list[nn.Module]] = {}

    def put(self, signature: Hashable, module: nn.Module) -> None:
        self._held.setdefault(signature, []).append(module)

    def take(self, signature: Hashable) -> nn.Module | None:
        """One of this signature, if there is any; it is no spare any more."""
        held = self._held.get(signature)
        return held.pop() if held else None

    def keep_only(self, wanted: Iterable[Hashable]) -> bool:
        """Lets go of what is of no use for these, one each. Whether there was any such."""
        kept: dict[Hashable, list[nn.Module]] = {}
        for each in wanted:
            if (module := self.take(each)) is not None:
                kept.setdefault(each, []).append(module)
        useless = any(self._held.values())
        self._held = kept
        return useless
