"""Pipelines beyond Stable Diffusion, by class name over HTTP, against stock Diffusers."""

from pathlib import Path

import diffusers
import pytest

from tests.tools import tiny_others
from tests.tools.compare import asked, drawn, over_http, received, same
from tests.tools.server import RunningServer


@pytest.fixture(scope="module")
def others(model_dir: Path) -> Path:
    """Each checkpoint is called by the name of its class."""
    folder = model_dir / "checkpoints" / "others"
    for name in tiny_others.CASES:
        tiny_others.build(folder / name, name)
    return folder


@pytest.mark.parametrize("name", tiny_others.CASES)
def test_a_pipeline_by_class_name_equals_stock(
    served: RunningServer, others: Path, name: str
) -> None:
    given = tiny_others.CASES[name][1]
    sent = given | {"seed": 7, "num_images_per_prompt": 2}
    images = over_http(served, f"others/{name}", name, sent)
    pipe = getattr(diffusers, name).from_pretrained(others / name)
    pipe.set_progress_bar_config(disable=True)
    for seed, image in enumerate(images, 7):
        assert same(image, drawn(pipe, seed, **given))
    assert not same(*images)
    [alone] = over_http(served, f"others/{name}", name, given | {"seed": 7})
    assert same(alone, images[0])
    more_steps = given | {"num_inference_steps": given["num_inference_steps"] + 1}
    assert not same(alone, drawn(pipe, 7, **more_steps))
    if "prompt" in given:
        assert not same(alone, drawn(pipe, 7, **given | {"prompt": "a blue dog in a tree"}))


@pytest.mark.parametrize("name", ["FluxPipeline", "DDPMPipeline"])
def test_the_class_follows_from_the_checkpoint(
    served: RunningServer, others: Path, name: str
) -> None:
    given = tiny_others.CASES[name][1] | {"seed": 7}
    body = {"checkpoint": f"others/{name}", "parameters": given, "output_format": "png"}
    answer = served.generate(body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["inputs"]["pipeline"] == name
    assert same(received(answer)[0], over_http(served, f"others/{name}", name, given)[0])


def test_a_scheduler_that_fits_is_taken_and_one_that_does_not_is_refused(
    served: RunningServer, others: Path
) -> None:
    name, given = "FluxPipeline", tiny_others.CASES["FluxPipeline"][1]
    checkpoint = f"others/{name}"
    refused = asked(served, checkpoint, name, given, scheduler="DDIMScheduler")
    assert (refused.status_code, refused.json()["field"]) == (422, "scheduler")
    chosen = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
    [image] = over_http(served, checkpoint, name, given | {"seed": 7}, **chosen)
    assert same(image, over_http(served, checkpoint, name, given | {"seed": 7})[0])


@pytest.mark.parametrize(
    ("checkpoint", "pipeline"),
    [("FluxPipeline", "StableDiffusion3Pipeline"), ("DDPMPipeline", "FluxPipeline")],
)
def test_a_class_whose_parts_a_checkpoint_lacks_is_refused(
    served: RunningServer, others: Path, checkpoint: str, pipeline: str
) -> None:
    given = tiny_others.CASES[pipeline][1]
    answer = asked(served, f"others/{checkpoint}", pipeline, given)
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] == "incompatible_model"
    assert answer.json()["field"] in ("checkpoint", "pipeline")


def test_a_class_that_is_not_served_says_why(served: RunningServer) -> None:
    answer = asked(served, "sd15", "SanaVideoPipeline", {"prompt": "a cat"})
    assert answer.status_code == 422
    assert "makes videos" in answer.json()["detail"]
    assert answer.json()["field"] == "pipeline"
