"""Pipelines beyond Stable Diffusion run by class name on the same path, and equal stock."""

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ipc import messages as m
from tests.tools import tiny_others
from tests.tools.worker_client import WorkerClient, pictures

torch.set_num_threads(1)


def compare(worker: WorkerClient, name: str, folder: Path, given: dict[str, Any]) -> None:
    received = worker.generate(
        pipeline=name,
        checkpoint=m.Model(name=name, path=str(folder)),
        parameters=given,
        calls=[m.Call(seed=7), m.Call(seed=8)],
        deterministic=True,
    )
    seven, eight = (np.array(Image.open(io.BytesIO(data))) for data in pictures(received))
    pipeline = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
    for seed, ours in ((7, seven), (8, eight)):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert np.array_equal(ours, np.array(pipeline(**given, generator=generator).images[0]))
    assert not np.array_equal(seven, eight)
    steps = [each.step for each in received if isinstance(each, m.Progress)]
    assert steps == sorted(steps)
    assert steps[-1] >= 2 * given["num_inference_steps"]


@pytest.mark.parametrize("name", tiny_others.CASES)
def test_a_pipeline_by_class_name_equals_stock(
    worker: WorkerClient, tmp_path: Path, name: str
) -> None:
    compare(worker, name, tiny_others.build(tmp_path / name, name), tiny_others.CASES[name][1])


def test_perturbed_attention_equals_stock_and_is_gone_for_the_next_request(
    worker: WorkerClient, tiny_models: Path
) -> None:
    plain = {"prompt": "a cat", "num_inference_steps": 3, "width": 64, "height": 64}
    folder = tiny_models / "sd15"
    compare(worker, "StableDiffusionPAGPipeline", folder, plain | {"pag_scale": 3.0})
    compare(worker, "StableDiffusionPipeline", folder, plain)


def test_perturbed_attention_is_gone_after_a_job_that_was_cancelled(
    worker: WorkerClient, tiny_models: Path
) -> None:
    plain = {"prompt": "a cat", "num_inference_steps": 3, "width": 64, "height": 64}
    model = m.Model(name="sd15", path=str(tiny_models / "sd15"), family="sd15")
    worker.send(
        m.Generate(
            job="endless",
            pipeline="StableDiffusionPAGPipeline",
            checkpoint=model,
            calls=[m.Call(seed=1)],
            parameters=plain | {"num_inference_steps": 900, "pag_scale": 3.0},
            scheduler=m.Scheduler(class_name="EulerDiscreteScheduler"),
        )
    )
    while not (isinstance(told := worker.receive(), m.Progress) and told.step > 2):
        pass
    worker.send(m.Cancel(job="endless"))
    assert worker.until_end()[-1] == m.Cancelled(job="endless")
    compare(worker, "StableDiffusionPipeline", tiny_models / "sd15", plain)
