"""LAUNCH_VAE and safety checkers: a server with its own models, against stock Diffusers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from tests.tools import compare, tiny
from tests.tools.cells import call_parameters, controlnet, expected, parameters_for, pipeline_name
from tests.tools.compare import asked, pixels, received, same
from tests.tools.server import RunningServer, running

SD = "StableDiffusionPipeline"


@pytest.fixture(scope="module")
def models(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safety checker that flags all, and a checkpoint `own` with one that flags none."""
    models = tmp_path_factory.mktemp("launched-models")
    for name in ("checkpoints/sd15", "checkpoints/sdxl", "vae/sd15", "controlnet/sd15-a"):
        shutil.copytree(model_dir / name, models / name)
    own = models / "checkpoints" / "own"
    shutil.copytree(model_dir / "checkpoints" / "sd15", own)
    tiny.build_safety_checker(models / "safety_checker", flags=True)
    with_own_checker(own)
    return models


@pytest.fixture(scope="module")
def launched(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """It checks pictures unless told otherwise."""
    settings = {"LAUNCH_CHECKPOINT": "sd15", "LAUNCH_VAE": "sd15", "LOAD_SAFETY_CHECKER": "true"}
    data_dir = tmp_path_factory.mktemp("launched")
    with running(data_dir, MODEL_DIR=str(models), **settings) as server:
        yield server


def with_own_checker(checkpoint: Path) -> None:
    """As published: the checker and its feature extractor in folders of their own."""
    tiny.build_safety_checker(checkpoint / "safety_checker", flags=False)
    (checkpoint / "feature_extractor").mkdir()
    settings = "preprocessor_config.json"
    shutil.move(checkpoint / "safety_checker" / settings, checkpoint / "feature_extractor")
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))


def drawn(
    server: RunningServer, checkpoint: str, pipeline: str, **more: Any
) -> tuple[Image.Image, Any]:
    """The picture, and whether it was flagged."""
    given = parameters_for(pipeline, checkpoint) | {"seed": 7}
    answer = asked(server, checkpoint, pipeline, given, **more)
    assert answer.status_code == 200, answer.text
    [flagged] = answer.json()["meta"]["nsfw"]
    return received(answer)[0], flagged


def is_black(picture: Image.Image) -> bool:
    return not np.any(pixels(picture))


def test_the_launched_checkpoint_has_the_launched_vae(
    launched: RunningServer, model_dir: Path
) -> None:
    given = parameters_for(SD, "sd15")
    vae = diffusers.AutoencoderKL.from_pretrained(model_dir / "vae" / "sd15")
    right = expected(model_dir, "sd15", SD, given, 7, vae=vae)
    [worker] = launched.placement()
    told = [(model["checkpoint"], model["vae"]) for model in worker["models"]]
    assert told[0] == ("sd15", "sd15")
    body = {"parameters": given | {"seed": 7}, "safety_checker": False, "output_format": "png"}
    for checkpoint in ({}, {"checkpoint": "sd15"}):
        answer = launched.generate(body | checkpoint)
        assert answer.status_code == 200, answer.text
        assert answer.json()["inputs"]["vae"] == "sd15"
        assert same(received(answer)[0], right)
    assert not same(right, expected(model_dir, "sd15", SD, given, 7))


def test_another_checkpoint_keeps_its_own_vae(launched: RunningServer, model_dir: Path) -> None:
    picture, flagged = drawn(launched, "own", SD, safety_checker=False)
    assert same(picture, expected(model_dir, "sd15", SD, parameters_for(SD, "sd15"), 7))
    assert flagged is None


@pytest.mark.parametrize(
    ("checkpoint", "task"),
    [("sd15", ""), ("sd15", "ControlNet"), ("sdxl", ""), ("sdxl", "Img2Img"), ("sdxl", "Inpaint")],
)
def test_flagged_pictures_are_black_unless_the_request_wants_no_check(
    launched: RunningServer, checkpoint: str, task: str
) -> None:
    name = pipeline_name(checkpoint, task)
    more = {"control_model": "sd15-a"} if task == "ControlNet" else {}
    picture, flagged = drawn(launched, checkpoint, name, **more)
    assert is_black(picture)
    assert flagged is True
    picture, flagged = drawn(launched, checkpoint, name, safety_checker=False, **more)
    assert not is_black(picture)
    assert flagged is None


@pytest.mark.parametrize("task", ["", "ControlNet"])
def test_a_checkpoints_own_checker_goes_before_and_equals_stock(
    launched: RunningServer, model_dir: Path, models: Path, task: str
) -> None:
    name = pipeline_name("sd15", task)
    more = {"control_model": "sd15-a"} if task else {}
    picture, flagged = drawn(launched, "own", name, **more)
    assert flagged is False
    folder = models / "checkpoints" / "own"
    parts = {"controlnet": controlnet(model_dir, "sd15")} if task else {}
    pipe = getattr(diffusers, name).from_pretrained(folder, **parts)
    assert type(pipe.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    given = call_parameters(name, parameters_for(name, "sd15"))
    assert same(picture, compare.drawn(pipe, 7, **given))
