"""Out of memory: a worker lives through it, unless its memory does not come back."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ipc import messages as m
from tests.tools import weights
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until
from tests.tools.worker_client import LEAKING, WorkerClient, pictures


def ask(server: RunningServer, prompt: str, steps: int = 2) -> dict[str, object]:
    parameters = {"prompt": prompt, "num_inference_steps": steps}
    answer = server.generate({"checkpoint": "cat", "parameters": parameters}).json()
    return answer.get("meta") or answer  # type: ignore[no-any-return]


def test_a_worn_worker_finishes_what_runs_and_its_successor_does_the_rest(tmp_path: Path) -> None:
    weights.files(tmp_path / "models/checkpoints/cat", weights.checkpoint_files("sd15"))
    with (
        running(tmp_path, SCRIPTED, IGI_SCRIPT="capacity=2") as server,
        ThreadPoolExecutor(4) as callers,
    ):
        [before] = server.placement()
        long = callers.submit(ask, server, "fault:slow step_seconds=0.1", 20)
        wait_until(lambda: server.placement()[0]["running"] == 1)
        assert ask(server, "fault:out_of_memory worn=1")["code"] == "out_of_memory"
        wait_until(lambda: server.placement()[0]["state"] == "draining")
        waiting = callers.submit(ask, server, "a cat")
        assert long.result()["attempts"] == 1
        assert waiting.result()["attempts"] == 1
        [after] = server.placement()
        assert before["pid"] != after["pid"]
        words = "asked to be replaced (memory): cannot get 1.50 GB back (exited with code 0)"
        assert (after["last_exit"], after["restarts"]) == (words, 1)
        figures = server.client.get("/metrics").text
        assert 'igi_worker_exits_total{reason="worn",worker="0"} 1.0' in figures
        assert not os.path.exists(f"/proc/{before['pid']}")


def test_running_out_of_memory_fifty_times_makes_nothing_grow(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real worker: what a failed forward held is let go of, whoever looked at its error."""
    memory_is_out = tmp_path / "out"
    memory_is_out.write_text("text_encoder 100000")
    monkeypatch.setenv("IGI_OUT_OF_MEMORY_FILE", str(memory_is_out))
    monkeypatch.setenv("IGI_ALLOCATED_BYTES", "0")
    sizes = []
    request = {
        "pipeline": "StableDiffusionPipeline",
        "checkpoint": m.Model(name="sd15", path=str(tiny_models / "sd15"), family="sd15"),
        "parameters": {"prompt": "a cat", "num_inference_steps": 2, "width": 64, "height": 64},
    }
    with WorkerClient(LEAKING) as client:
        client.ready()
        process = psutil.Process(client.process.pid)
        for _ in range(50):
            failed = client.generate(**request)[-1]
            assert isinstance(failed, m.Failed)
            assert failed.code == "out_of_memory"
            sizes.append(process.memory_info().rss)
        memory_is_out.unlink()
        assert pictures(client.generate(**request))
    assert sizes[-1] < sizes[9] * 1.02 + 4 * 2**20


def test_two_hundred_swaps_of_checkpoints_and_loras_leave_memory_flat(
    model_dir: Path, tmp_path: Path
) -> None:
    """There is room for one of the two checkpoints."""
    checkpoints = []
    for name in ("one", "two"):
        shutil.copytree(model_dir / "checkpoints/sd15", tmp_path / name)
        checkpoints.append(m.Model(name=name, path=str(tmp_path / name), family="sd15"))
    files = Path(checkpoints[0].path).rglob("*.safetensors")
    room = int(1.5 * sum(file.stat().st_size for file in files))
    loras = [
        m.Model(name=letter, path=str(model_dir / f"lora/sd15-diffusers-{letter}.safetensors"))
        for letter in "ab"
    ]
    start = m.Start(protocol=m.PROTOCOL_VERSION, device="cpu", device_memory_bytes=room)
    parameters = {"prompt": "a cat", "num_inference_steps": 1, "width": 64, "height": 64}
    with WorkerClient(start=start) as client:
        client.ready()
        process, sizes, loads = psutil.Process(client.process.pid), [], 0
        for swap in range(200):
            received = client.generate(
                pipeline="StableDiffusionPipeline",
                checkpoint=checkpoints[swap % 2],
                loras=[m.Lora(model=loras[swap // 2 % 2])],
                parameters=parameters,
            )
            assert pictures(received)
            loads += any(isinstance(each, m.Residency) for each in received)
            sizes.append(process.memory_info().rss)
    assert loads == 200
    assert sizes[-1] < sizes[49] * 1.01 + 4 * 2**20
