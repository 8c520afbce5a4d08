"""The real worker against broken models, wrong requests, want of room and a dead parent."""

import json
import os
import pickle
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.loop import serve
from ipc import messages as m
from ipc.channel import BlockingChannel, Codec
from tests.tools.worker_client import ROOT, WorkerClient, pictures

PARAMETERS = {"prompt": "a cat", "num_inference_steps": 2, "width": 64, "height": 64}


def sd15(folder: Path, name: str = "sd15") -> m.Model:
    return m.Model(name=name, path=str(folder), family="sd15")


def job(model: m.Model, **changes: Any) -> dict[str, Any]:
    request = {"pipeline": "StableDiffusionPipeline", "checkpoint": model}
    return request | {"parameters": PARAMETERS} | changes


def rejection(received: list[m.FromWorker], parts: Path) -> m.Rejected:
    last = received[-1]
    assert isinstance(last, m.Rejected), last
    assert str(parts) not in last.detail
    return last


class Bomb:
    """A pickle that leaves a file behind if anybody opens it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def cut_weights_short(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def announce_a_huge_header(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\xff\xff\xff\xff\0\0\0\0" + weights.read_bytes()[8:])


def disguise_a_pickle(folder: Path) -> None:
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(pickle.dumps(Bomb(folder / "trace")))


def give_a_pickle_only(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "trace")))


def name_a_pickle_as_a_shard(folder: Path) -> None:
    (folder / "vae/pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "trace")))
    index = {"metadata": {}, "weight_map": {"encoder.conv_in.weight": "pytorch_model.bin"}}
    path = folder / "vae/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def list_code_of_its_own(folder: Path) -> None:
    (folder / "trap.py").write_text("import os; os.mkdir('trace')")
    change_index(folder, unet=["trap", "Trap"])


def list_what_is_no_model(folder: Path) -> None:
    change_index(folder, unet=["transformers", "pipeline"])


def take_the_tokenizers_words(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        if "config" not in file.name:
            file.unlink()


def take_a_part(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def break_the_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[" * 100_000)


def widen_the_configuration(folder: Path) -> None:
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 48}))


def take_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights_short,
        announce_a_huge_header,
        disguise_a_pickle,
        give_a_pickle_only,
        name_a_pickle_as_a_shard,
        list_code_of_its_own,
        list_what_is_no_model,
        take_the_tokenizers_words,
        take_a_part,
        break_the_index,
        widen_the_configuration,
        take_a_tensor,
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_of_it_runs(
    worker: WorkerClient, tiny_models: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    began = time.monotonic()
    told = rejection(worker.generate(**job(sd15(tmp_path / "damaged", "damaged"))), tmp_path)
    assert (told.code, told.field) == ("invalid_model", "checkpoint")
    assert told.detail.startswith("cannot load 'damaged': ")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "damaged/trace").exists()
    assert pictures(worker.generate(**job(sd15(tiny_models / "sd15"))))


def test_weights_in_half_precision_alone_are_loaded(
    worker: WorkerClient, tiny_models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_models / "sd15", folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    whole = pictures(worker.generate(**job(sd15(tiny_models / "sd15"))))
    assert pictures(worker.generate(**job(sd15(folder, "half")))) == whole


WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "an unknown pipeline": ({"pipeline": "NoPipeline"}, "invalid_request", "pipeline"),
    "what is no pipeline": ({"pipeline": "UNet2DConditionModel"}, "invalid_request", "pipeline"),
    "a pipeline of other parts": ({"pipeline": "FluxPipeline"}, "incompatible_model", "checkpoint"),
    "an unknown scheduler": (
        {"scheduler": m.Scheduler(class_name="NoScheduler")},
        "invalid_request",
        "scheduler",
    ),
    "a scheduler of another kind": (
        {"scheduler": m.Scheduler(class_name="FlowMatchEulerDiscreteScheduler")},
        "invalid_request",
        "scheduler",
    ),
    "another pipeline's parameter": (
        {"parameters": PARAMETERS | {"original_size": [64, 64]}},
        "invalid_request",
        "parameters.original_size",
    ),
    "a height that is no multiple of 8": (
        {"parameters": PARAMETERS | {"height": 63}},
        "invalid_request",
        "parameters.height",
    ),
    "no prompt": ({"parameters": {"num_inference_steps": 2}}, "invalid_request", None),
    "a strength of 2": (
        {
            "pipeline": "StableDiffusionImg2ImgPipeline",
            "parameters": {"prompt": "a cat", "strength": 2.0},
            "images": {"image": [b"RIFF"]},
        },
        "invalid_request",
        "parameters.image",
    ),
    "a ControlNet pipeline without one": (
        {"pipeline": "StableDiffusionControlNetPipeline"},
        "invalid_request",
        "control_model",
    ),
    "a safety checker that it has not": (
        {"safety_checker": True},
        "invalid_request",
        "safety_checker",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_refused_and_names_the_field(
    worker: WorkerClient, tiny_models: Path, what: str
) -> None:
    changes, code, field = WRONG[what]
    told = rejection(worker.generate(**job(sd15(tiny_models / "sd15")) | changes), tiny_models)
    assert (told.code, told.field) == (code, field)
    assert told.detail.startswith("cannot ")
    assert pictures(worker.generate(**job(sd15(tiny_models / "sd15"))))


def wrong_models(models: Path) -> dict[str, tuple[dict[str, Any], str]]:
    from tests.tools import tiny

    net = tiny.build_controlnet(models / "control-sd21", "sd21")
    vae = tiny.build_vae(models / "vae-sd15", "sd15", seed=9)
    base = m.Model(name="sdxl", path=str(models / "sdxl"), family="sdxl")
    return {
        "vae": ({"vae": m.Model(name="net", path=str(net))}, "vae"),
        "control_model": ({"controlnets": [m.Model(name="net", path=str(net))]}, "control_model"),
        "no_control_model": (
            {"controlnets": [m.Model(name="vae", path=str(vae))]},
            "control_model",
        ),
        "refiner": ({"refiner": m.Refiner(checkpoint=base)}, "refiner_model"),
    }


@pytest.mark.parametrize("what", ["vae", "control_model", "no_control_model", "refiner"])
def test_models_that_do_not_fit_are_refused(
    worker: WorkerClient, tiny_models: Path, what: str
) -> None:
    changes, field = wrong_models(tiny_models)[what]
    told = rejection(worker.generate(**job(sd15(tiny_models / "sd15")) | changes), tiny_models)
    assert (told.code, told.field) == ("incompatible_model", field)
    assert pictures(worker.generate(**job(sd15(tiny_models / "sd15"))))


def held(received: list[m.FromWorker]) -> list[list[str]]:
    """The names that each Residency lists."""
    return [
        [model.checkpoint for model in each.models]
        for each in received
        if isinstance(each, m.Residency)
    ]


def load(client: WorkerClient, model: m.Model) -> list[m.FromWorker]:
    client.send(m.Load(job=model.name, checkpoint=model))
    return client.until_end()


def test_the_checkpoint_that_was_not_used_for_longest_makes_room(
    tiny_models: Path, tmp_path: Path
) -> None:
    models = [sd15(tmp_path / name, name) for name in ("one", "two", "three")]
    for model in models:
        shutil.copytree(tiny_models / "sd15", model.path)
    bytes_each = sum(file.stat().st_size for file in Path(models[0].path).rglob("*.safetensors"))
    budget = m.Start(
        protocol=m.PROTOCOL_VERSION, device="cpu", device_memory_bytes=int(2.5 * bytes_each)
    )
    with WorkerClient(start=budget) as client:
        client.ready()
        one, two, three = models
        assert held(load(client, one)) == [["one"]]
        assert held(load(client, two)) == [["one", "two"]]
        assert pictures(client.generate(**job(one)))
        # Told of together, or where it takes longer than residency may be late, one by one.
        assert held(load(client, three)) in ([["one", "three"]], [["one"], ["one", "three"]])


def test_a_checkpoint_larger_than_the_budget_is_out_of_memory(tiny_models: Path) -> None:
    budget = m.Start(protocol=m.PROTOCOL_VERSION, device="cpu", device_memory_bytes=1000)
    with WorkerClient(start=budget) as client:
        client.ready()
        told = load(client, sd15(tiny_models / "sd15"))[-1]
        assert isinstance(told, m.Failed)
        assert told.code == "out_of_memory"


def test_a_worker_dies_with_the_process_that_started_it(tiny_models: Path) -> None:
    """A parent of its own starts it, hands its pipes over to nobody and is killed."""
    script = (
        "import os, sys, time\n"
        "from tests.tools.worker_client import WorkerClient\n"
        "client = WorkerClient()\n"
        "client.ready()\n"
        "print(client.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    watch = os.pidfd_open(child)
    parent.kill()
    parent.wait()
    assert select.select([watch], [], [], 10)[0], "the worker outlived its parent"
    parent.stdout.close()
    os.close(watch)


def test_the_loop_says_why_when_the_device_cannot_be_had() -> None:
    from_us, to_worker = os.pipe()
    to_us, from_worker = os.pipe()
    supervisor: Any = BlockingChannel(to_us, to_worker, Codec(m.FromWorker))
    channel: Any = BlockingChannel(from_us, from_worker, Codec(m.ToWorker))

    def make_runner(start: m.Start, send: Any) -> Any:
        raise RuntimeError("no such device in /dev/nvidia7")

    supervisor.send(m.Start(protocol=m.PROTOCOL_VERSION, device="cuda:7"))
    assert serve(channel, make_runner) == 70
    told = supervisor.receive()
    assert isinstance(told, m.Fatal)
    assert told.reason == "start"
    assert "nvidia7" not in told.detail
    for descriptor in (from_us, to_worker, to_us, from_worker):
        os.close(descriptor)
