"""The stages of scripts/bench: each measures, prints as it goes and adds rows to the results.

python -m scripts.bench_stages STAGE DEVICE WORK_FOLDER RESULTS_FILE
"""

import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from gpu_worker.compilers import Compiler
from gpu_worker.compilers.cuda_graph import CudaGraphs
from gpu_worker.compilers.inductor import Inductor
from gpu_worker.compilers.none import Uncompiled
from gpu_worker.device import quiet_libraries
from scripts.bench_engine import Checkpoint, Job, jobs_of, stock, synchronize, timed
from scripts.bench_modules import decoder, text_encoders
from scripts.bench_rig import (
    SIZES,
    STARTED,
    Results,
    Server,
    compiled_by,
    device_of,
    is_compiling,
    lone_jobs,
    rate,
    wait_for,
    worst_psnr,
)
from scripts.bench_swaps import UnguidedJob, controlled_jobs, swaps

CALLERS = {"sd15": 8, "sdxl": 4, "tiny_sd15": 8, "tiny_sdxl": 4, "demo": 4}
TARGETS = {
    "sd15 one": "≥ 5.5 x, ≥ 152 it/s on an H200",
    "sd15 many": "≥ 8 x, ≥ 227 it/s on an H200",
    "sdxl one": "≥ 1.9 x, ≥ 29.4 it/s on an H200",
    "sdxl many": "30.9 it/s on an H200",
}
LONG, SHORT = 50, 20
"""Steps of a lone caller's job, and of those that share."""


def architecture(results: Results, name: str, device: torch.device, work: Path) -> None:
    """Stock, graphs and compiled code, one caller and many."""
    size, callers = SIZES[name], CALLERS[name]
    is_demo = name == "demo"
    checkpoint = Checkpoint.demo(device) if is_demo else Checkpoint.random(name, device, 0)
    scale = 1 if device.type == "cuda" else 5
    lone = lone_jobs(checkpoint, size, LONG // scale)
    many = jobs_of([checkpoint], [(size, size)], 5 * callers, SHORT // scale + 2)
    label = f"{name} {size}²"
    stock([replace(lone[0], steps=3)])
    seconds, expected = timed(lambda: stock(lone))
    base = rate(lone, seconds)
    results.add(f"{label} stock, one at a time", f"{base:.1f} it/s", 1.0)
    reference = stock(many[: 2 * callers])
    backends: dict[str, Callable[[], Compiler]] = {
        "compiled": lambda: compiled_by(device, work),
        "engine": Uncompiled,
    }
    if device.type == "cuda":
        backends = {
            "compiled + graphs": backends["compiled"],
            "graphs": lambda: CudaGraphs(Uncompiled(), device),
        }
    for how, make in backends.items():
        server = Server(checkpoint, make())
        try:
            compile_first(results, server, lone, f"{label} {how}")
            last = how.startswith("compiled")
            family = name.removeprefix("tiny_")
            server.run(lone[:1], 1)
            served(results, f"{label} {how}, one caller", server, lone, 1, base, expected,
                   TARGETS.get(f"{family} one", "") if last else "")  # fmt: skip
            server.run(many[:callers], callers)
            served(results, f"{label} {how}, {callers} callers", server, many, callers, base,
                   reference, TARGETS.get(f"{family} many", "") if last else "")  # fmt: skip
            some = many[: 2 * callers]
            deterministic(results, f"{label} {how}", server, some, callers, reference[0])
            if device.type == "cuda" and last:
                profile(results, label, server, checkpoint, size)
        finally:
            server.close()
    if not is_demo:
        decoder(results, name, device, work)
        text_encoders(results, name, device)


def served(
    results: Results, what: str, server: Server, jobs: list[Job], callers: int, base: float,
    expected: list[torch.Tensor], target: str,
) -> None:  # fmt: skip
    seconds, made = timed(lambda: server.run(jobs, callers))
    measured = rate(jobs, seconds) if callers == 1 else server.full_rate
    note = worst_psnr(made, expected)
    results.add(what, f"{measured:.1f} it/s", measured / base, target, note)


def deterministic(
    results: Results, label: str, server: Server, jobs: list[Job], callers: int,
    stock_latents: torch.Tensor,
) -> None:  # fmt: skip
    """The first job alone and twice among others."""
    alone = server.run(jobs[:1], 1, deterministic=[0])[0]
    again = [server.run(jobs, callers, deterministic=[0])[0] for _ in range(2)]
    same = all(torch.equal(alone, each) for each in again)
    like_stock = "and equal to stock" if torch.equal(alone, stock_latents) else "unlike stock"
    value = "bit-identical" if same else "DIFFERS"
    results.add(f"{label}, deterministic under load", value, None, "bit-identical", like_stock)


def compile_first(
    results: Results, server: Server, jobs: list[Job], label: str, serves: bool = True
) -> None:
    """Serves one caller until its code is compiled."""
    inductor = getattr(server.compiler, "_inner", server.compiler)
    if not isinstance(inductor, Inductor):
        return
    server.run([replace(jobs[0], steps=8)], 1)
    began, meanwhile = time.monotonic(), list[float]()
    job = replace(jobs[0], steps=10)
    while serves and is_compiling(server.compiler):
        meanwhile.append(seconds_of(server, job))
    wait_for(server.compiler)
    took, since = time.monotonic() - began, time.monotonic() - STARTED
    note = f"done {since:.1f} s after the imports"
    if meanwhile:
        median, worst = (
            each / job.steps for each in (statistics.median(meanwhile), max(meanwhile))
        )
        note += f"; one caller meanwhile: {1 / median:.1f} it/s, worst {worst:.3f} s a step"
    results.add(f"{label}: compilation", f"{took:.1f} s", note=note)


def seconds_of(server: Server, job: Job) -> float:
    began = time.monotonic()
    server.run([job], 1)
    synchronize()
    return time.monotonic() - began


def profile(
    results: Results, label: str, server: Server, checkpoint: Checkpoint, size: int
) -> None:
    """The denoiser's graph alone: what is left of a step is scheduler, guidance and engine."""
    jobs = lone_jobs(checkpoint, size, LONG, 1)
    graphs = server.compiler
    assert isinstance(graphs, CudaGraphs)
    captured = [entry for entry in graphs._entries.values() if entry.graph is not None]
    seconds, _ = timed(lambda: server.run(jobs, 1))
    for entry in captured:
        assert entry.graph is not None
        rows = entry.graph._inputs[0].shape[0]
        replay = entry.graph._graph.replay
        alone = min(
            timed(lambda replay=replay: [replay() for _ in range(10)])[0] / 10 for _ in "ab"
        )
        results.add(f"{label} the denoiser's graph alone, {rows} rows", f"{alone * 1000:.2f} ms",
                    note=f"a whole step of one caller: {seconds / LONG * 1000:.2f} ms"
                    if rows == 2 else "")  # fmt: skip
    pool = graphs.pool_bytes / 2**30
    results.add(f"{label} graphs", f"{graphs.graphs} graphs", note=f"pool {pool:.2f} GB")


def compile_only(results: Results, name: str, device: torch.device, work: Path) -> None:
    """With an empty cache and no callers: kernels are chosen by their time on the device."""
    checkpoint = Checkpoint.random(name, device, 0)
    server = Server(checkpoint, compiled_by(device, work))
    jobs = lone_jobs(checkpoint, SIZES[name], LONG, 1)
    stock([replace(jobs[0], steps=3)])
    compile_first(results, server, jobs, f"{name} cold (all at once)", serves=False)


def more(results: Results, device: torch.device, work: Path) -> None:
    prefix = "" if device.type == "cuda" else "tiny_"
    size = SIZES[f"{prefix}sd15"]
    large = Checkpoint.random(f"{prefix}sdxl", device, 0)
    for steps in (1, 4):
        turbo = [UnguidedJob(**vars(job)) for job in lone_jobs(large, size, steps)]
        label = f"{prefix}sdxl {size}², {steps} steps, no guidance"
        special(results, label, large, turbo, [], device, work, "", compiles=False)
    del large, turbo
    checkpoint = Checkpoint.random(f"{prefix}sd15", device, 0)
    jobs, net = controlled_jobs(checkpoint, size, LONG if prefix == "" else 5)
    label, target = f"{prefix}sd15 {size}² + ControlNet", "72.6 it/s: stable-fast on an H100"
    special(results, label, checkpoint, jobs, [net], device, work, target)


def special(
    results: Results, label: str, checkpoint: Checkpoint, jobs: list[Any], parts: list[Any],
    device: torch.device, work: Path, target: str, compiles: bool = True,
) -> None:  # fmt: skip
    """One caller: stock, graphs, compiled."""
    stock(jobs[:1])
    base, expected = timed(lambda: stock(jobs))
    each = f"{base / len(jobs) * 1000:.1f} ms a picture"
    results.add(f"{label}, stock", f"{rate(jobs, base):.1f} it/s", 1.0, "", each)
    makes: dict[str, Callable[[], Compiler]] = {}
    if device.type == "cuda":
        makes["graphs"] = lambda: CudaGraphs(Uncompiled(), device)
    if compiles:
        makes["compiled"] = lambda: compiled_by(device, work)
    for how, make in makes.items():
        server = Server(checkpoint, make(), parts)
        for _ in range(3):
            server.run([replace(jobs[0], steps=max(4, jobs[0].steps))], 1)
        wait_for(server.compiler)
        for _ in range(3):
            server.run(jobs, 1)
        seconds, made = timed(lambda server=server: server.run(jobs, 1))  # type: ignore[misc]
        note = f"{seconds / len(jobs) * 1000:.1f} ms a picture, {worst_psnr(made, expected)}"
        results.add(
            f"{label}, {how}", f"{rate(jobs, seconds):.1f} it/s", base / seconds, target, note
        )
        server.close()


def build_stable_fast(results: Results, work: Path) -> None:
    """Where it is not installed."""
    sys.path.insert(0, str(work / "stable-fast"))
    if subprocess.run([sys.executable, "-c", "import sfast"], capture_output=True).returncode:
        began = time.monotonic()
        subprocess.run(["scripts/build_stable_fast", str(work / "stable-fast")], check=True)
        results.add("stable-fast: build", f"{time.monotonic() - began:.0f} s")


def stable_fast(results: Results, device: torch.device, work: Path) -> None:
    from gpu_worker.compilers.stable_fast import StableFast

    build_stable_fast(results, work)
    for name in ("sd15", "sdxl"):
        checkpoint = Checkpoint.random(name, device, 0)
        jobs = lone_jobs(checkpoint, SIZES[name], LONG)
        stock([replace(jobs[0], steps=3)])
        base, expected = timed(lambda jobs=jobs: stock(jobs))
        server = Server(checkpoint, CudaGraphs(StableFast("cuda"), device))
        began = time.monotonic()
        server.run([replace(jobs[0], steps=5)], 1)
        synchronize()
        took = time.monotonic() - began
        seconds, made = timed(lambda server=server, jobs=jobs: server.run(jobs, 1))
        results.add(f"{name} {SIZES[name]}² stable-fast + graphs, one caller",
                    f"{rate(jobs, seconds):.1f} it/s", base / seconds, "",
                    f"{worst_psnr(made, expected)}, first job {took:.1f} s")  # fmt: skip
        server.close()


def main() -> None:
    stage, device_name, work, path = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("gpu_worker.compilers").setLevel(logging.INFO)
    torch.set_grad_enabled(False)
    device, results, folder = device_of(device_name), Results(Path(path)), Path(work)
    quiet_libraries()
    if device.type == "cuda":
        torch.zeros(1, device=device)
        name = torch.cuda.get_device_name(device)
        versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        print(f"== {stage}: {name}, {versions}", flush=True)
    else:
        torch.set_num_threads(1)
    prefix = "" if device.type == "cuda" else "tiny_"
    match stage:
        case "sd15" | "sdxl":
            architecture(results, prefix + stage, device, folder)
        case "demo":
            architecture(results, stage, device, folder)
        case "compile_sd15" | "compile_sdxl":
            compile_only(results, prefix + stage.removeprefix("compile_"), device, folder)
        case "swap":
            for name in ("sdxl", "sd15"):
                swaps(results, prefix + name, device, folder)
        case "more":
            more(results, device, folder)
        case "stable_fast":
            stable_fast(results, device, folder)
        case _:
            raise SystemExit(f"cannot run {stage}: there is no such stage")


if __name__ == "__main__":
    main()
