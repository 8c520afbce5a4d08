"""The demo's scores on a few prompts held out from training: evaluate.py takes minutes for more.

A model that is right exactly as often as wanted misses a threshold here once in a hundred samples;
tossing coins for relations reaches the threshold twice in a hundred.
"""

from pathlib import Path

import pytest
from PIL import Image
from scipy.stats import binom

from scripts.demo_model import evaluate
from scripts.demo_model.questions import Question, held_out_questions

CHECKPOINT = Path(__file__).parents[2] / "gpu_worker" / "demo" / "checkpoint"
ALONE, PAIRS = 6, 30
OBJECTS = ALONE + 2 * PAIRS
WANTED = {
    "background colour": (0.97, ALONE + PAIRS),
    "object colour": (0.95, OBJECTS),
    "shape": (0.90, OBJECTS),
    "relation, two objects": (0.85, PAIRS),
}
"""How often it must be right in the long run, and how often it is asked here."""
DOUBT = 0.01


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    several = held_out_questions(PAIRS)
    return several[:ALONE] + several[-PAIRS:]


@pytest.fixture(scope="module")
def pictures(questions: list[Question]) -> list[Image.Image]:
    return list(evaluate.draw(evaluate.load(CHECKPOINT, "cpu"), questions))


def threshold(share: float, count: int) -> float:
    """In percent."""
    return float(100 * binom.ppf(DOUBT, count, share) / count)


@pytest.mark.parametrize("name", WANTED)
def test_the_demo_draws_what_held_out_prompts_say(
    name: str, questions: list[Question], pictures: list[Image.Image]
) -> None:
    assert evaluate.scores(questions, pictures)[name] >= threshold(*WANTED[name])


@pytest.mark.parametrize("name", WANTED)
def test_no_score_is_reached_with_the_pictures_of_other_prompts(
    name: str, questions: list[Question], pictures: list[Image.Image]
) -> None:
    others = [*pictures[1:], pictures[0]]
    assert evaluate.scores(questions, others)[name] < threshold(*WANTED[name])
