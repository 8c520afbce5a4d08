"""The real worker with several jobs at once."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipc import messages as m
from tests.tools.worker_client import ENDS, WorkerClient

PARAMETERS = {"prompt": "a cat", "num_inference_steps": 4, "width": 64, "height": 64}
ENDLESS = PARAMETERS | {"num_inference_steps": 900}
Received = list[m.FromWorker]


def model(path: Path) -> m.Model:
    return m.Model(name=path.name, path=str(path), family="sd15")


def job(name: str, checkpoint: m.Model, **changes: Any) -> m.Generate:
    values: dict[str, Any] = {
        "job": name,
        "pipeline": "StableDiffusionPipeline",
        "checkpoint": checkpoint,
        "calls": [m.Call(seed=1)],
        "parameters": PARAMETERS,
        "output_format": "png",
    }
    return m.Generate(**values | changes)


def until_ended(client: WorkerClient, jobs: set[str]) -> Received:
    """All messages until each of the jobs has ended."""
    received: Received = []
    while jobs:
        received.append(client.receive())
        if isinstance(received[-1], ENDS):
            assert not isinstance(received[-1], m.Fatal), received[-1]
            jobs = jobs - {received[-1].job}
    return received


def until_denoising(client: WorkerClient, name: str) -> Received:
    """All messages until that job has made some steps."""
    received: Received = []
    while True:
        received.append(told := client.receive())
        if isinstance(told, m.Progress) and told.job == name and told.step > 2:
            return received


def until_loading(client: WorkerClient, name: str) -> None:
    while client.receive() != m.Progress(job=name, phase="loading"):
        pass


def ends(received: Received) -> dict[str, m.FromWorker]:
    """The last messages of jobs, by job, in order."""
    return {getattr(each, "job", "fatal"): each for each in received if isinstance(each, ENDS)}


def is_step(message: m.FromWorker, name: str) -> bool:
    return isinstance(message, m.Progress) and message.job == name


def picture(received: Received, name: str) -> Any:
    [data] = [each.data for each in received if isinstance(each, m.Picture) and each.job == name]
    return np.array(Image.open(io.BytesIO(data))).astype(int)


def test_jobs_that_differ_in_all_they_may_give_their_own_pictures(
    worker: WorkerClient, tiny_models: Path
) -> None:
    checkpoint = model(tiny_models / "sd15")
    other = m.Model(name="sdxl", path=str(tiny_models / "sdxl"), family="sdxl")
    jobs = [
        job("plain", checkpoint),
        job("seed", checkpoint, calls=[m.Call(seed=9)]),
        job("steps", checkpoint, parameters=PARAMETERS | {"num_inference_steps": 7}),
        job("unguided", checkpoint, parameters=PARAMETERS | {"guidance_scale": 1.0}),
        job("euler", checkpoint, scheduler=m.Scheduler(class_name="EulerDiscreteScheduler")),
        job("wide", checkpoint, parameters=PARAMETERS | {"width": 128}),
        job("model", other, pipeline="StableDiffusionXLPipeline"),
        job("own", checkpoint, deterministic=True),
    ]
    alone = {}
    for each in jobs:
        worker.send(each)
        alone[each.job] = picture(until_ended(worker, {each.job}), each.job)
    for each in jobs:
        worker.send(each)
    together = until_ended(worker, {each.job for each in jobs})
    for name, expected in alone.items():
        # Sharing a step changes roundings, and so a few values by 1 of 255.
        assert np.abs(picture(together, name) - expected).max() <= 1, name
    assert np.array_equal(picture(together, "own"), alone["own"])


def test_a_job_that_fails_or_is_cancelled_leaves_the_others_alone(
    worker: WorkerClient, tiny_models: Path
) -> None:
    checkpoint = model(tiny_models / "sd15")
    worker.send(job("endless", checkpoint, parameters=ENDLESS))
    until_denoising(worker, "endless")
    worker.send(job("wrong", checkpoint, parameters=PARAMETERS | {"prompt_embeds": [1]}))
    worker.send(job("gone", checkpoint, parameters=ENDLESS, calls=[m.Call(seed=1), m.Call(seed=2)]))
    worker.send(job("right", checkpoint))
    received = until_denoising(worker, "gone")
    worker.send(m.Cancel(job="gone"))
    received += until_ended(worker, {"wrong", "gone", "right"} - set(ends(received)))
    assert isinstance(ends(received)["right"], m.Finished)
    assert ends(received)["gone"] == m.Cancelled(job="gone")
    assert isinstance(ends(received)["wrong"], m.Rejected | m.Failed)
    worker.send(job("last", checkpoint))
    assert isinstance(ends(until_ended(worker, {"last"}))["last"], m.Finished)
    worker.send(m.Cancel(job="endless"))
    assert ends(until_ended(worker, {"endless"})) == {"endless": m.Cancelled(job="endless")}


def test_models_that_do_not_fit_together_take_turns(tiny_models: Path, tmp_path: Path) -> None:
    names = ("first", "second", "third")
    for name in names:
        shutil.copytree(tiny_models / "sd15", tmp_path / name)
    files = (tmp_path / "first").rglob("*.safetensors")
    one_and_a_half = int(1.5 * sum(file.stat().st_size for file in files))
    start = m.Start(protocol=m.PROTOCOL_VERSION, device="cpu", device_memory_bytes=one_and_a_half)
    with WorkerClient(start=start) as client:
        client.ready()
        for number in range(2):
            for name in names:
                client.send(job(f"{name}-{number}", model(tmp_path / name)))
        received = until_ended(client, {f"{name}-{n}" for name in names for n in range(2)})
    assert all(isinstance(end, m.Finished) for end in ends(received).values())


def test_a_job_that_waits_for_room_holds_up_nobody_but_who_wants_what_is_in_its_way(
    tiny_models: Path, tmp_path: Path
) -> None:
    names = ("wanted", "idling", "third")
    for name in names:
        shutil.copytree(tiny_models / "sd15", tmp_path / name)
    wanted, idling, third = (model(tmp_path / name) for name in names)
    files = (tmp_path / "wanted").rglob("*.safetensors")
    for_two = int(2.5 * sum(file.stat().st_size for file in files))
    start = m.Start(protocol=m.PROTOCOL_VERSION, device="cpu", device_memory_bytes=for_two)
    with WorkerClient(start=start) as client:
        client.ready()
        for name, checkpoint in (("one", wanted), ("two", wanted), ("last", idling)):
            client.send(job(name, checkpoint, parameters=ENDLESS))
            until_denoising(client, name)
        client.send(job("waiting", third))
        until_loading(client, "waiting")
        for _ in range(10):  # meanwhile there was found to be no room
            until_denoising(client, "last")
        client.send(job("behind", idling))
        client.send(job("beside", wanted))
        received = until_ended(client, {"beside"})
        assert list(ends(received)) == ["beside"]
        client.send(m.Cancel(job="last"))
        received = until_ended(client, {"waiting", "behind"})
        assert list(ends(received)) == ["last", "waiting", "behind"]
        assert isinstance(ends(received)["behind"], m.Finished)


def test_a_job_can_be_cancelled_while_it_waits_for_room(tiny_models: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(tiny_models / "sd15", tmp_path / name)
    files = (tmp_path / "first").rglob("*.safetensors")
    one_and_a_half = int(1.5 * sum(file.stat().st_size for file in files))
    start = m.Start(protocol=m.PROTOCOL_VERSION, device="cpu", device_memory_bytes=one_and_a_half)
    with WorkerClient(start=start) as client:
        client.ready()
        client.send(job("endless", model(tmp_path / "first"), parameters=ENDLESS))
        until_denoising(client, "endless")
        client.send(job("waiting", model(tmp_path / "second")))
        until_denoising(client, "endless")
        client.send(m.Cancel(job="waiting"))
        assert ends(until_ended(client, {"waiting"})) == {"waiting": m.Cancelled(job="waiting")}
        client.send(m.Cancel(job="endless"))
        until_ended(client, {"endless"})
        client.send(job("second", model(tmp_path / "second")))
        assert isinstance(ends(until_ended(client, {"second"}))["second"], m.Finished)


def test_an_urgent_job_overtakes_those_that_wait(worker: WorkerClient, tiny_models: Path) -> None:
    checkpoint = model(tiny_models / "sd15")
    long = PARAMETERS | {"num_inference_steps": 20}
    calls = [m.Call(seed=seed) for seed in range(20)]
    worker.send(job("long", checkpoint, parameters=long, calls=calls))
    until_denoising(worker, "long")
    worker.send(job("urgent", checkpoint, priority=5))
    received = until_ended(worker, {"long", "urgent"})
    assert list(ends(received)) == ["urgent", "long"]
    first_pictures = [each.job for each in received if isinstance(each, m.Picture)]
    assert first_pictures[0] == "urgent"


def test_a_checkpoint_is_unloaded_when_no_job_uses_it_any_more(
    worker: WorkerClient, tiny_models: Path
) -> None:
    checkpoint = model(tiny_models / "sd15")
    worker.send(job("running", checkpoint, parameters=PARAMETERS | {"num_inference_steps": 30}))
    until_denoising(worker, "running")
    worker.send(m.Unload(job="unload", checkpoint=checkpoint))
    received = until_ended(worker, {"running", "unload"})
    assert isinstance(ends(received)["running"], m.Finished)
    residency = [each for each in received if isinstance(each, m.Residency)][-1]
    assert checkpoint.path not in {each.path for each in residency.models}
    last_step = max(i for i, each in enumerate(received) if is_step(each, "running"))
    assert received.index(residency) > last_step
