"""What of a request can be prepared without a thread, and that it comes to the same."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from supervisor.errors import Problem
from supervisor.models import FRESH_SECONDS, Models
from supervisor.preparation import Preparation, Prepared
from supervisor.requests import GenerateBody
from supervisor.settings import Settings
from tests.tools.clock import Clock
from tests.tools.model_folders import LORA
from tests.tools.weights import safetensors

PICTURE = "data:image/png;base64,AAAA"


@pytest.fixture
def preparation(root: Path, sd15: None, clock: Clock) -> Preparation:
    safetensors(root / "lora" / "style.safetensors", LORA)
    settings = Settings(model_dir=root)
    return Preparation(settings, Models(settings, clock=clock))


def body(parameters: dict[str, Any] | None = None, **fields: Any) -> GenerateBody:
    given = {"prompt": "a cat", "seed": 7} | (parameters or {})
    return msgspec.convert({"checkpoint": "sd15", "parameters": given} | fields, GenerateBody)


def test_a_request_whose_models_were_looked_at_needs_no_thread(preparation: Preparation) -> None:
    asked = body(loras=[{"model": "style.safetensors", "scale": 0.5}])
    assert preparation.at_once(asked, "job") is None, "nobody has looked at them"
    in_a_thread = preparation.prepare(asked, "job")
    assert preparation.at_once(asked, "job") == in_a_thread


def test_what_was_looked_at_long_ago_is_looked_at_again(
    preparation: Preparation, clock: Clock
) -> None:
    preparation.prepare(body(), "job")
    clock.now = FRESH_SECONDS
    assert preparation.at_once(body(), "job") is None
    preparation.prepare(body(), "job")
    assert isinstance(preparation.at_once(body(), "job"), Prepared)


@pytest.mark.parametrize(
    "asked",
    [
        body({"image": PICTURE, "strength": 0.5}),
        body({"image": PICTURE, "mask_image": PICTURE}),
        body(loras=[{"model": "other.safetensors"}]),
        body(vae="nowhere"),
        body(safety_checker=True),
        body(checkpoint=None),
    ],
    ids=["image", "mask", "lora", "vae", "safety checker", "default checkpoint"],
)
def test_what_needs_files_or_pictures_is_left_to_a_thread(
    preparation: Preparation, asked: GenerateBody
) -> None:
    preparation.prepare(body(), "job")
    assert preparation.at_once(asked, "job") is None


def test_what_is_wrong_is_refused_at_once(preparation: Preparation) -> None:
    preparation.prepare(body(), "job")
    with pytest.raises(Problem) as raised:
        preparation.at_once(body({"width": 13}), "job")
    assert raised.value.field == "parameters.width"
