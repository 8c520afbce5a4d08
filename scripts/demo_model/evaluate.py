"""Scores the exported checkpoint on prompts held out from training.

python -m scripts.demo_model.evaluate --checkpoint gpu_worker/demo/checkpoint
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from scripts.demo_model.captions import Row, full_caption
from scripts.demo_model.judge import judge
from scripts.demo_model.latents import to_rows
from scripts.demo_model.scenes import join, sample_scenes

STEPS = 20
GUIDANCE = 4.0
_SEED = 20_000


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


def scores(questions: list[Question], pictures: list[Image.Image]) -> dict[str, float]:
    """Return the shares of right answers, in percent, by what was asked."""
    answers: dict[str, list[bool]] = defaultdict(list)
    for question, picture in zip(questions, pictures, strict=True):
        verdict = judge(picture, question.row)
        objects = "one object" if question.row.count == 1 else "two objects"
        answers["background colour"].append(verdict.background)
        for name, found in (("object colour", verdict.colours), ("shape", verdict.shapes)):
            answers[name].extend(found)
            answers[f"{name}, {objects}"].extend(found)
        if verdict.relation is not None:
            answers["relation, two objects"].append(verdict.relation)
    return {name: round(100 * sum(all_) / len(all_), 1) for name, all_ in sorted(answers.items())}


def draw(
    pipeline: StableDiffusionPipeline,
    questions: list[Question],
    batch: int = 8,
    guidance: float = GUIDANCE,
) -> Iterator[Image.Image]:
    """Draw each question's picture with its own seed."""
    for start in range(0, len(questions), batch):
        some = questions[start : start + batch]
        yield from pipeline(
            [question.prompt for question in some],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(question.seed) for question in some],
        ).images


def load(checkpoint: Path, device: str) -> StableDiffusionPipeline:
    """Load a checkpoint folder with stock Diffusers, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def main() -> None:
    """Print the scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("gpu_worker/demo/checkpoint"))
    parser.add_argument("--each", type=int, default=100, help="prompts per number of objects")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--any-background", action="store_true", help="also gradients and stripes")
    arguments = parser.parse_args()
    pipeline = load(arguments.checkpoint, arguments.device)
    questions = held_out_questions(arguments.each, plain=not arguments.any_background)
    pictures = list(draw(pipeline, questions, arguments.batch, arguments.guidance))
    print(json.dumps(scores(questions, pictures), indent=1))


if __name__ == "__main__":
    main()
