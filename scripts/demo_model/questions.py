"""Prompts that were held out from training, with the scenes that they describe."""

import random
from dataclasses import dataclass
from typing import Final

import torch

from scripts.demo_model.captions import Row, full_caption
from scripts.demo_model.latents import to_rows
from scripts.demo_model.scenes import join, sample_scenes

_SEED: Final = 20_000


@dataclass(frozen=True)
class Question:
    """A prompt, the scene it describes and the seed to draw it with."""

    prompt: str
    row: Row
    seed: int


def held_out_questions(each: int, *, plain: bool = True) -> list[Question]:
    """Return `each` prompts of one object and as many of two, of combinations never trained on."""
    generator = torch.Generator().manual_seed(_SEED)
    background = "plain" if plain else None
    scenes = join(
        [
            sample_scenes(each, generator, held_out=True, objects=count, background=background)
            for count in (1, 2)
        ]
    )
    rng = random.Random(_SEED)
    rows = to_rows(scenes)
    return [Question(full_caption(row, rng), row, _SEED + i) for i, row in enumerate(rows)]
