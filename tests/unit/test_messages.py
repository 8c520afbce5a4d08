"""Every message has a golden file: what travels does not change by accident."""

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from ipc import messages as m

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = m.Model(name="cat.safetensors", path="/models/cat.safetensors", family="sd15",
                single_file=True, config="/configs/sd15", prediction_type="epsilon")  # fmt: skip
MEMORY = m.Memory(total=8, used=3, free=5)
RESIDENT = m.Resident(checkpoint="cat", path="/cat", family="sdxl", vae="v", loras=["l"],
                      tier="device", bytes=7, last_used=1.5)  # fmt: skip

EXAMPLES: list[m.Message] = [
    m.Start(protocol=m.PROTOCOL_VERSION, device="cuda:0", dtype="float16", device_memory_bytes=9,
            host_memory_bytes=10, compile_backend="inductor", cuda_graph=True, cache_dir="/c"),
    m.Generate(job="j", pipeline="StableDiffusionPipeline", checkpoint=MODEL,
               calls=[m.Call(seed=7, parameters={"prompt": "a"}, metadata={"parameters": "a"})],
               parameters={"num_inference_steps": 2}, images={"image": [b"\x00\xff"]},
               scheduler=m.Scheduler(class_name="DDIMScheduler", settings={"eta": 0.5}),
               vae=MODEL, controlnets=[MODEL], loras=[m.Lora(model=MODEL, scale=0.5)],
               refiner=m.Refiner(checkpoint=MODEL, parameters={"strength": 0.25}),
               safety_checker=True, output_format="png", output_quality=80, previews=1,
               deterministic=True, alone=True, priority=-3, progress_seconds=0.25),
    m.Load(job="j", checkpoint=MODEL, vae=MODEL),
    m.Unload(job="j", checkpoint=MODEL),
    m.Cancel(job="j"),
    m.Shutdown(),
    m.Ready(protocol=m.PROTOCOL_VERSION, device_name="a GPU", memory=MEMORY,
            packages={"torch": "2.13.0", "xformers": None}, capacity=8),
    m.Progress(job="j", phase="denoising", step=1, steps=2),
    m.Preview(job="j", index=0, data=b"\x01"),
    m.Picture(job="j", index=1, data=b"\x02", nsfw=False),
    m.Finished(job="j", load_seconds=0.5, generation_seconds=1.5, encode_seconds=0.25,
               step_seconds=0.125, batch_rows=2.5, memory_fallback="tiling"),
    m.Rejected(job="j", code="invalid_request", detail="cannot", field="parameters.width"),
    m.Failed(job="j", code="generation_failed", detail="cannot"),
    m.Cancelled(job="j"),
    m.Residency(models=[RESIDENT], memory=MEMORY),
    m.Worn(reason="memory", detail="cannot get 1.50 GB back"),
    m.Fatal(reason="a CUDA error", detail="device-side assert"),
]  # fmt: skip


def name(message: m.Message) -> str:
    return type(message).__name__.lower()


def test_every_message_has_an_example() -> None:
    known = {*get_args(m.ToWorker), *get_args(m.FromWorker)}
    assert {type(example) for example in EXAMPLES} == known


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_a_message_travels_as_its_golden_file_says(example: m.Message) -> None:
    content: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(example))
    shown = msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"
    assert shown == (GOLDEN / f"{name(example)}.json").read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_a_message_arrives_as_it_was_sent(example: m.Message) -> None:
    union: Any = m.ToWorker if isinstance(example, get_args(m.ToWorker)) else m.FromWorker
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(example), type=union) == example
