"""Scores the exported checkpoint on prompts held out from training.

python -m scripts.demo_model.evaluate --checkpoint gpu_worker/demo/checkpoint
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from scripts.demo_model.judge import judge
from scripts.demo_model.questions import Question, held_out_questions

STEPS = 20
GUIDANCE = 4.0


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


def contact_sheet(pictures: list[Image.Image], columns: int = 10) -> Image.Image:
    """Put pictures of one size side by side, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def load(checkpoint: Path, device: str) -> StableDiffusionPipeline:
    """Load a checkpoint folder with stock Diffusers, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
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
    parser.add_argument("--pictures", type=Path, help="file to show the pictures in")
    arguments = parser.parse_args()
    pipeline = load(arguments.checkpoint, arguments.device)
    questions = held_out_questions(arguments.each, plain=not arguments.any_background)
    pictures = list(draw(pipeline, questions, arguments.batch, arguments.guidance))
    if arguments.pictures:
        contact_sheet(pictures).save(arguments.pictures)
    print(json.dumps(scores(questions, pictures), indent=1))


if __name__ == "__main__":
    main()
