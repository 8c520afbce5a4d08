"""The real worker and the scripted one, held to the same sequences of messages."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.loop import EXIT_FATAL
from ipc import messages as m
from tests.tools.worker_client import (
    ASSERTING,
    LEAKING,
    REAL,
    SCRIPTED,
    WorkerClient,
    pictures,
)

KINDS = pytest.mark.parametrize("kind", [REAL, SCRIPTED], ids=["real", "scripted"])
PARAMETERS = {"prompt": "a cat", "num_inference_steps": 3, "width": 64, "height": 64}
# The scripted worker's steps take no time unless its prompt says so.
ENDLESS = PARAMETERS | {"num_inference_steps": 900, "prompt": "fault:slow step_seconds=0.02"}


@pytest.fixture(scope="module", params=[REAL, SCRIPTED], ids=["real", "scripted"])
def client(request: pytest.FixtureRequest) -> Iterator[WorkerClient]:
    if request.param == REAL:
        yield request.getfixturevalue("worker")
        return
    with WorkerClient(SCRIPTED) as scripted:
        scripted.ready()
        yield scripted


@pytest.fixture
def model(tiny_models: Path, tmp_path: Path) -> m.Model:
    """A checkpoint that no worker holds yet."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_models / "sd15", folder)
    return m.Model(name="checkpoint", path=str(folder), family="sd15")


def job(model: m.Model, **changes: Any) -> dict[str, Any]:
    return {
        "pipeline": "StableDiffusionPipeline",
        "checkpoint": model,
        "calls": [m.Call(seed=1), m.Call(seed=2)],
        "parameters": PARAMETERS,
        "scheduler": m.Scheduler(class_name="EulerDiscreteScheduler"),
    } | changes


def outline(received: list[m.FromWorker]) -> list[str]:
    """The messages by name; pictures overlap the next call, so their place does not count."""
    names = [
        each.phase if isinstance(each, m.Progress) else type(each).__name__
        for each in received
        if not isinstance(each, m.Picture)
    ]
    count = sum(isinstance(each, m.Picture) for each in received)
    return [*names[:-1], *["Picture"] * count, names[-1]]


@KINDS
def test_a_worker_says_that_it_is_ready_and_holds_nothing(kind: tuple[str, ...]) -> None:
    with WorkerClient(kind) as client:
        ready, residency = client.ready()
        assert isinstance(ready, m.Ready)
        assert ready.protocol == m.PROTOCOL_VERSION
        assert ready.memory.total > 0
        assert isinstance(residency, m.Residency)
        assert residency.models == []
        client.send(m.Shutdown())
        assert client.process.wait(10) == 0


@KINDS
def test_another_protocol_is_refused_with_last_words(kind: tuple[str, ...]) -> None:
    with WorkerClient(kind, m.Start(protocol=999, device="cpu")) as client:
        last_words = client.receive()
        assert isinstance(last_words, m.Fatal)
        assert last_words.reason == "protocol"
        assert client.process.wait(10) != 0


@pytest.mark.parametrize("comes_back", [True, False], ids=["back", "lost"])
@pytest.mark.parametrize("kind", [LEAKING, SCRIPTED], ids=["real", "scripted"])
def test_a_worker_whose_memory_does_not_come_back_asks_to_be_replaced_and_goes_on(
    kind: tuple[str, ...],
    comes_back: bool,
    model: m.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory_is_out = tmp_path / "out"
    memory_is_out.write_text("text_encoder 1000")
    monkeypatch.setenv("IGI_OUT_OF_MEMORY_FILE", str(memory_is_out))
    monkeypatch.setenv("IGI_ALLOCATED_BYTES", "0" if comes_back else str(2**50))
    prompt = f"fault:out_of_memory step=2 worn={int(not comes_back)}"
    with WorkerClient(kind) as client:
        client.ready()
        failed = client.generate(**job(model, parameters=PARAMETERS | {"prompt": prompt}))[-1]
        assert isinstance(failed, m.Failed)
        assert failed.code == "out_of_memory"
        memory_is_out.unlink()
        received = client.generate(**job(model))
        assert len(pictures(received)) == 2
        asked = [each for each in received if isinstance(each, m.Worn)]
        assert [each.reason for each in asked] == ([] if comes_back else ["memory"])
        client.send(m.Shutdown())
        assert client.process.wait(10) == 0


@pytest.mark.parametrize(("part", "rung"), [("unet", "split_batch"), ("vae", "tiling")])
@pytest.mark.parametrize("kind", [LEAKING, SCRIPTED], ids=["real", "scripted"])
def test_a_job_that_memory_was_short_for_says_what_helped(
    kind: tuple[str, ...],
    part: str,
    rung: str,
    model: m.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a step and in the VAE; the next job needs no help."""
    memory_is_out = tmp_path / "out"
    memory_is_out.write_text(f"{part} 1")
    monkeypatch.setenv("IGI_OUT_OF_MEMORY_FILE", str(memory_is_out))
    monkeypatch.setenv("IGI_ALLOCATED_BYTES", "0")
    prompt = f"fault:out_of_memory step=2 memory_fallback={rung}"
    request = job(model, calls=[m.Call(seed=1)])
    with WorkerClient(kind) as client:
        client.ready()
        helped = client.generate(**request | {"parameters": PARAMETERS | {"prompt": prompt}})
        assert len(pictures(helped)) == 1
        told = [helped[-1], client.generate(**request)[-1]]
        rungs = [each.memory_fallback for each in told if isinstance(each, m.Finished)]
        assert rungs == [rung, None]


@pytest.mark.parametrize("kind", [ASSERTING, SCRIPTED], ids=["real", "scripted"])
def test_a_cuda_error_ends_a_worker_with_an_exit_code_of_its_own(
    kind: tuple[str, ...], model: m.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    monkeypatch.setenv("IGI_ASSERT_FILE", str(broken))
    with WorkerClient(kind) as client:
        client.ready()
        prompt = {"prompt": "fault:cuda_error step=1"}
        last_words = client.generate(**job(model, parameters=PARAMETERS | prompt))[-1]
        assert isinstance(last_words, m.Fatal)
        assert last_words.reason == "device"
        assert last_words.detail.startswith("cannot go on: ")
        assert client.process.wait(10) == EXIT_FATAL


@KINDS
def test_the_end_of_the_pipe_ends_a_worker(kind: tuple[str, ...]) -> None:
    with WorkerClient(kind) as client:
        client.ready()
        client.close()
        assert client.process.wait(10) == 0


@KINDS
def test_a_term_signal_ends_a_worker_in_the_middle_of_a_job(
    kind: tuple[str, ...], model: m.Model
) -> None:
    with WorkerClient(kind) as client:
        client.ready()
        client.send(m.Generate(job="endless", **job(model, parameters=ENDLESS)))
        while not (isinstance(told := client.receive(), m.Progress) and told.step > 2):
            pass
        os.kill(client.process.pid, signal.SIGTERM)
        assert client.process.wait(10) == 0


def test_a_job_is_told_from_loading_to_finished(client: WorkerClient, model: m.Model) -> None:
    received = client.generate(**job(model))
    told = outline(received)
    assert (told[:2], told[-1]) == (["loading", "Residency"], "Finished")
    # Pictures may be made one after the other or together.
    each = ["encoding", *["denoising"] * 3, "decoding", "Picture"]
    assert sorted(told[2:-1]) == sorted(each * 2)
    assert [(told.step, told.steps) for told in denoising(received)] == [
        (step, 6) for step in range(1, 7)
    ]
    assert {each.job for each in received if not isinstance(each, m.Residency)} == {
        received[-1].job  # type: ignore[union-attr]
    }
    assert all(data.startswith(b"\x89PNG") for data in pictures(received))


def test_where_nobody_looks_the_newest_sign_of_progress_comes_with_what_must_be_said(
    client: WorkerClient, model: m.Model
) -> None:
    request = job(model, calls=[m.Call(seed=1)], parameters=PARAMETERS | {"num_inference_steps": 9})
    client.generate(**request)
    received = client.generate(**request, progress_seconds=60.0)
    assert outline(received) == ["decoding", "Picture", "Finished"]
    assert received[0] == m.Progress(job=received[-1].job, phase="decoding", step=9, steps=9)


def denoising(received: list[m.FromWorker]) -> list[m.Progress]:
    return [each for each in received if isinstance(each, m.Progress) and each.phase == "denoising"]


def test_a_picture_follows_from_its_seed_alone(client: WorkerClient, model: m.Model) -> None:
    both = pictures(client.generate(**job(model, deterministic=True)))
    second = pictures(client.generate(**job(model, calls=[m.Call(seed=2)])))
    assert both[0] != both[1]
    assert second == both[1:]


def test_pictures_come_in_the_asked_format(client: WorkerClient, model: m.Model) -> None:
    [data] = pictures(client.generate(**job(model, calls=[m.Call(seed=1)], output_format="webp")))
    assert data[8:12] == b"WEBP"


def test_a_checkpoint_stays_resident_until_it_is_unloaded(
    client: WorkerClient, model: m.Model
) -> None:
    client.send(m.Load(job="load", checkpoint=model))
    received = client.until_end()
    assert outline(received) == ["loading", "Residency", "Finished"]
    held = residents(received[1])[model.path]
    assert (held.checkpoint, held.family, held.tier) == ("checkpoint", "sd15", "device")
    assert held.bytes > 0

    client.send(m.Load(job="again", checkpoint=model))
    assert outline(client.until_end()) == ["loading", "Finished"]

    client.send(m.Unload(job="unload", checkpoint=model))
    received = client.until_end()
    assert outline(received) == ["Residency", "Finished"]
    assert model.path not in residents(received[0])

    client.send(m.Unload(job="twice", checkpoint=model))
    assert outline(client.until_end()) == ["Finished"]


def residents(message: m.FromWorker) -> dict[str, m.Resident]:
    assert isinstance(message, m.Residency)
    return {each.path: each for each in message.models}


def test_a_checkpoint_that_is_gone_is_rejected(client: WorkerClient, tmp_path: Path) -> None:
    gone = m.Model(name="gone", path=str(tmp_path / "gone"), family="sd15")
    received = client.generate(**job(gone))
    assert outline(received) == ["loading", "Rejected"]
    assert isinstance(rejected := received[-1], m.Rejected)
    assert (rejected.code, rejected.field) == ("unknown_model", "checkpoint")
    assert "gone" in rejected.detail
    assert str(tmp_path) not in rejected.detail


def test_a_cancelled_job_ends_at_its_next_step(client: WorkerClient, model: m.Model) -> None:
    client.send(m.Generate(job="endless", **job(model, parameters=ENDLESS)))
    while not (isinstance(told := client.receive(), m.Progress) and told.step > 2):
        pass
    client.send(m.Cancel(job="endless"))
    assert client.until_end()[-1] == m.Cancelled(job="endless")
    assert len(pictures(client.generate(**job(model)))) == 2


def test_a_job_can_be_cancelled_while_it_waits(client: WorkerClient, model: m.Model) -> None:
    client.send(m.Generate(job="first", **job(model, parameters=ENDLESS)))
    client.send(m.Generate(job="second", **job(model)))
    client.send(m.Cancel(job="second"))
    client.send(m.Cancel(job="first"))
    ends = [client.until_end()[-1], client.until_end()[-1]]
    assert sorted(end.job for end in ends if isinstance(end, m.Cancelled)) == ["first", "second"]


def test_cancelling_what_does_not_run_changes_nothing(client: WorkerClient, model: m.Model) -> None:
    client.send(m.Cancel(job="nobody"))
    assert len(pictures(client.generate(**job(model)))) == 2
