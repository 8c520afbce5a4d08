"""What the stages of scripts/bench run on: a server without HTTP, its clock, rows of results."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from gpu_worker.compilers import Compiler
from gpu_worker.compilers.cuda_graph import CudaGraphs
from gpu_worker.compilers.inductor import Inductor
from gpu_worker.engine import Engine, Task
from gpu_worker.forwards import Forwards
from gpu_worker.interposer import interposable, restore
from gpu_worker.limits import Limits, memory_of
from gpu_worker.pace import pace_of
from gpu_worker.slots import lay_out
from gpu_worker.transfer import unwaited
from scripts.bench_engine import Checkpoint, Job, jobs_of

STARTED = time.monotonic()
SIZES = {"sd15": 512, "sdxl": 1024, "tiny_sd15": 64, "tiny_sdxl": 64, "demo": 128}


class Results:
    """Rows of the table, printed as they come and kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(
        self, what: str, value: str, ratio: float | None = None, target: str = "", note: str = ""
    ) -> None:
        row = {"what": what, "value": value, "ratio": ratio, "target": target, "note": note}
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        shown = f"{ratio:.2f} x" if ratio else ""
        seconds = time.monotonic() - STARTED
        print(f"[{seconds:5.0f} s] {what:44} {value:16} {shown:9} {note}", flush=True)


class Moment:
    """A time in the device's order of work; orders are given earlier."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_until(self, later: "Moment") -> float:
        if self._event is None:
            return later._seconds - self._seconds
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000


class Server:
    """The engine over one checkpoint's modules with a compiler, as the worker has them.

    `full_rate` is that of the last run while as many jobs ran as there were callers, in steps of
    all pictures per second: from when the first was done and another came, so that not all begin
    at once, until none waited any more.
    """

    def __init__(
        self, checkpoint: Checkpoint, compiler: Compiler, parts: Sequence[Any] = ()
    ) -> None:
        self.compiler = compiler
        self._device = device = checkpoint.device
        limits = Limits(memory=memory_of(device), buckets=compiler.buckets)
        forwards = Forwards(limits, compiler.run, pace=pace_of(device))
        self._engine = Engine(forwards, max_running=64, around=unwaited(device))
        everything = [*checkpoint.pipe.components.values(), *parts]
        self._parts = list(interposable(everything))
        self._lay_out(compiler.memory_format)
        for module, method in self._parts:
            self._engine.adopt(module, method)

    def run(
        self, jobs: Sequence[Any], callers: int, deterministic: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """`callers` jobs at a time; the next begins when one ends."""
        results: dict[int, torch.Tensor] = {}
        waiting, tasks = list(enumerate(jobs))[::-1], list[Task]()
        full = list[tuple[Moment, int]]()

        def body(index: int, job: Any) -> torch.Tensor:
            if index in (callers, len(jobs) - 1):
                full.append((Moment(self._device), sum(task.forwards for task in tasks)))
            latents: torch.Tensor = job.served()
            return latents

        def begin() -> None:
            if waiting:
                index, job = waiting.pop()
                task = Task(
                    index, partial(body, index, job), finished=partial(end, index), failed=fail
                )
                task.deterministic = index in deterministic
                tasks.append(task)
                self._engine.submit(task)

        def end(index: int, result: torch.Tensor) -> None:
            results[index] = result
            begin()

        def fail(error: Exception) -> None:
            raise error

        for _ in range(callers):
            begin()
        self._engine.run_until_idle()
        self.full_rate = math.nan
        if len(full) == 2:
            (begun, before), (over, after) = full
            self.full_rate = (after - before) / begun.seconds_until(over)
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        self.compiler.give_way()
        self._engine.close()
        for module, _ in self._parts:
            restore(module)
        self._lay_out(torch.contiguous_format)  # as stock Diffusers has them

    def _lay_out(self, memory_format: torch.memory_format) -> None:
        for module in {module for module, _ in self._parts}:
            lay_out(module, memory_format)


def lone_jobs(checkpoint: Checkpoint, size: int, steps: int, count: int = 2) -> list[Job]:
    return [
        replace(job, steps=steps) for job in jobs_of([checkpoint], [(size, size)], count, steps)
    ]


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """In decibels, of latents: the peak is the reference's range."""
    error = float((one.float() - other.float()).square().mean())
    peak = float(other.float().max() - other.float().min())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def rate(jobs: Sequence[Job], seconds: float) -> float:
    return sum(job.steps for job in jobs) / seconds


def worst_psnr(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    worst = min(psnr(*pair) for pair in zip(results, expected, strict=False))
    return f"PSNR ≥ {worst:.1f} dB"


def device_of(name: str) -> torch.device:
    return torch.device("cuda:0") if name == "cuda" else torch.device("cpu")


def compiled_by(device: torch.device, work: Path) -> Compiler:
    inductor = Inductor(work / "inductor", device)
    return CudaGraphs(inductor, device) if device.type == "cuda" else inductor


def wait_for(compiler: Compiler) -> None:
    inductor = compiler._inner if isinstance(compiler, CudaGraphs) else compiler
    if isinstance(inductor, Inductor):
        inductor.wait()


def is_compiling(compiler: Compiler) -> bool:
    inductor = compiler._inner if isinstance(compiler, CudaGraphs) else compiler
    assert isinstance(inductor, Inductor)
    return inductor.is_compiling


def true_vae(name: str, device: torch.device, seed: int = 0) -> Any:
    """SD1.5's and SDXL's are of one architecture; SDXL's decodes in float32."""
    torch.manual_seed(seed)
    widths = (8, 16) if name.startswith("tiny") else (128, 256, 512, 512)
    with torch.device(device):
        return diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=2,
            norm_num_groups=8 if name.startswith("tiny") else 32,
            latent_channels=4,
            force_upcast="xl" in name,
        ).eval()
