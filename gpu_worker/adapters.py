"""LoRAs, merged in place into a checkpoint's weights and taken out again bit for bit.

The storage of no weight ever moves, so compiled code and captured graphs stay valid and
a step costs nothing extra. Sums are made in float32 from the untouched weights each
time: nothing adds up over many changes. Whoever calls sees to it that no job of another
set of LoRAs is in the middle of a step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from gpu_worker.failures import Refusal
from gpu_worker.lora_files import Factors, Lora
from gpu_worker.transfer import fill, settle

Place = tuple[str, str]
"""A module of the pipeline and a layer in it: `("unet", "mid_block.attentions.0.proj_in")`."""
Source = Callable[[str, str], torch.Tensor | None]
"""The untouched weight of a module's parameter, exactly, or None if it has to be copied."""
Wanted = Sequence[tuple[Lora, float]]
"""LoRAs with their scales."""


class IncompatibleLora(Refusal):
    """A LoRA does not fit the checkpoint."""

    def __init__(self, lora: Lora, checkpoint: str, reason: str) -> None:
        detail = f"cannot use the LoRA {lora.name} with {checkpoint}: {reason}"
        super().__init__("incompatible_model", detail, "loras")


def adapter_key(wanted: Wanted) -> tuple[tuple[str, float], ...]:
    """What tells sets of LoRAs apart: jobs with equal keys can share a batch.

    The order does not matter, nor does a LoRA of scale 0.
    """
    return tuple(sorted((lora.identity, float(scale)) for lora, scale in wanted if scale))


@dataclass
class AdapterState:
    """What is merged into one checkpoint's modules.

    `modules` are named as in the pipeline (unet, text_encoder, text_encoder_2), `name` is
    the checkpoint's for refusals. Untouched weights are read from `source` where it has
    them, else copied to the host before they change, those that change alone.
    """

    name: str
    modules: Mapping[str, nn.Module]
    source: Source = lambda module, parameter: None
    merged: tuple[tuple[str, float], ...] = ()
    _originals: dict[Place, torch.Tensor] = field(default_factory=dict)

    def check(self, wanted: Wanted) -> None:
        """Raises IncompatibleLora, before anything is changed."""
        for lora, _ in wanted:
            for (module, layer), factors in places(lora):
                _check_fit(self.modules.get(module), lora, layer, factors, self.name)

    def ensure(self, wanted: Wanted) -> bool:
        """Make exactly these LoRAs the merged ones. Returns whether any weight was written.

        Raises IncompatibleLora with everything as it was. If anything else goes wrong
        nothing is left merged.
        """
        key = adapter_key(wanted)
        if key == self.merged:
            return False
        self.check(wanted)
        try:
            self._write(_by_place(wanted))
        except BaseException:
            self._write({})
            self.merged = ()
            raise
        self.merged = key
        return True

    def restore(self) -> bool:
        """Take out all LoRAs. Returns whether any weight was written."""
        return self.ensure(())

    def forget(self) -> None:
        """The modules have been given other weights: nothing is merged into those."""
        self._originals.clear()
        self.merged = ()

    @torch.no_grad()
    def _write(self, wanted: Mapping[Place, list[tuple[Factors, float]]]) -> None:
        devices = set[torch.device]()
        restored: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        for place in [*self._originals, *(new for new in wanted if new not in self._originals)]:
            weight = _layer(self.modules[place[0]], place[1]).weight
            devices.add(weight.device)
            original = self._original(place, weight)
            if place in wanted:
                weight.copy_(_sum(original, wanted[place], weight.device))
            else:
                restored[place] = (weight, original)
        fill(restored.values())
        settle(devices)
        for place in restored:
            del self._originals[place]

    def _original(self, place: Place, weight: torch.Tensor) -> torch.Tensor:
        if place not in self._originals:
            module, layer = place
            held = self.source(module, f"{_found(self.modules[module], layer)}.weight")
            copied = weight.to("cpu", copy=True) if held is None else held
            self._originals[place] = copied
        return self._originals[place]


def places(lora: Lora) -> Iterator[tuple[Place, Factors]]:
    for module, layers in lora.parts.items():
        for layer, factors in layers.items():
            yield (module, layer), factors


def _by_place(wanted: Wanted) -> dict[Place, list[tuple[Factors, float]]]:
    """In a fixed order, so that a set of LoRAs gives the same sum however it is given."""
    found: dict[Place, list[tuple[Factors, float]]] = {}
    for lora, scale in sorted(wanted, key=lambda each: (each[0].identity, each[1])):
        for place, factors in places(lora):
            if scale:
                found.setdefault(place, []).append((factors, scale))
    return found


def _sum(
    original: torch.Tensor, wanted: Iterable[tuple[Factors, float]], device: torch.device
) -> torch.Tensor:
    """The weight with the LoRAs' changes, in float32: W + Σ scale · alpha/rank · up · down."""
    # In the usual order of memory, whatever the weight's: a matrix is added to it.
    usual = torch.contiguous_format
    # To the device first: a host converts at a tenth of the bus's speed.
    there = original.to(device, non_blocking=True)
    total = there.to(torch.float32, copy=True, memory_format=usual)
    for factors, scale in wanted:
        factors.add_to(total, scale)
    return total


def _found(module: nn.Module, layer: str) -> str:
    """Transformers 5.6 took `text_model.` off CLIPTextModel's names; files still have it."""
    return layer if hasattr(module, "text_model") else layer.removeprefix("text_model.")


def _layer(module: nn.Module, layer: str) -> nn.Linear | nn.Conv2d:
    found = module.get_submodule(_found(module, layer))
    if not isinstance(found, nn.Linear | nn.Conv2d):
        raise AttributeError(layer)
    return found


def _check_fit(
    module: nn.Module | None, lora: Lora, layer: str, factors: Factors, checkpoint: str
) -> None:
    try:
        if module is None:
            raise AttributeError(layer)
        shape = _layer(module, layer).weight.shape
    except AttributeError:
        raise IncompatibleLora(lora, checkpoint, f"that has no layer {layer}") from None
    if (shape[0], shape[1:].numel()) != factors.shape:
        sizes = " by ".join(str(size) for size in factors.shape)
        right = f"{shape[0]} by {shape[1:].numel()}"
        reason = f"{layer} is {sizes} in the LoRA and {right} in the checkpoint"
        raise IncompatibleLora(lora, checkpoint, reason)
