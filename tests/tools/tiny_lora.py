"""Tiny LoRA files for the tiny checkpoints, in the layouts that are met in the wild.

`diffusers` is what `save_lora_weights` writes; `kohya` is what sd-scripts writes, where SDXL's
denoiser goes by the names of its first implementation. The same seed in both layouts is the same
change of the weights, bit for bit, so that both must give the same picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.tools import tiny
from tests.tools.tiny_families import architecture, text_indices

LAYOUTS = ("diffusers", "kohya")
RANK = 4
TARGETS = re.compile(
    r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)"
    r"|.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)
# Blocks of the denoiser hold this many layers, as everywhere in SD and SDXL.
LAYERS = 2


def build_lora(path: Path, family: str, layout: str = "diffusers", seed: int = 0) -> Path:
    """A LoRA over the denoiser's attention and every text encoder, strong enough to be seen."""
    tensors: dict[str, torch.Tensor] = {}
    with tiny.seeded(family, "lora", seed):
        for part, name, shape in list(targets(family)):
            tensors |= spelled(layout, architecture(family), part, name, *drawn(shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.save_aligned(tensors, path)
    return path


def targets(family: str) -> Iterator[tuple[str, str, torch.Size]]:
    """Component, layer and the shape of its weight, in a fixed order."""
    parts = {"unet": tiny.unet(family, 0)}
    for index in text_indices(family):
        parts["text_encoder_2" if index else "text_encoder"] = tiny.text_encoder(family, index, 0)
    for part, module in parts.items():
        for name, layer in module.named_modules():
            if TARGETS.fullmatch(name):
                yield part, name, layer.weight.shape


def drawn(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors; their product has about half the size of a fresh layer's weight."""
    down = torch.randn(RANK, *shape[1:]) / shape[1] ** 0.5
    up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:])) / 8
    return down, up


def spelled(
    layout: str, kind: str, part: str, name: str, down: torch.Tensor, up: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One layer's tensors under the names of a layout."""
    if part == "text_encoder":
        name = f"text_model.{name}"  # Transformers 5.6 dropped it; every file has it
    if layout == "diffusers":
        return {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    if part == "unet" and kind == "sdxl":
        name = first_names(name)
    prefix = {"unet": "unet", "text_encoder_2": "te2"}.get(part, "te1" if kind == "sdxl" else "te")
    layer = f"lora_{prefix}_{name.replace('.', '_')}"
    # An alpha of half the rank halves the change, so that alpha must be read.
    return {
        f"{layer}.lora_down.weight": down,
        f"{layer}.lora_up.weight": up * 2,
        f"{layer}.alpha": torch.tensor(RANK / 2),
    }


def first_names(name: str) -> str:
    """`down_blocks.1.attentions.0.x` as `input_blocks.4.1.x`, and so on."""
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0.", "middle_block.1.")
    direction, block, _, layer, rest = name.split(".", 4)
    position = int(block) * (LAYERS + 1) + int(layer)
    if direction == "down_blocks":
        return f"input_blocks.{position + 1}.1.{rest}"
    return f"output_blocks.{position}.1.{rest}"
