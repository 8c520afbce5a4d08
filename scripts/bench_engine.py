"""Times the engine against stock Diffusers, one call at a time, on the same jobs in one run.

Random weights of the true architectures, made from their configurations: nothing is
downloaded. Latents only. A figure is denoising steps of all pictures per second.

    python scripts/bench_engine.py --device cuda        SD1.5 512² and SDXL 1024², fp16
    python scripts/bench_engine.py --device cpu         the same jobs on tiny checkpoints
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch

from gpu_worker.batching import Layout
from gpu_worker.engine import Engine, Task
from gpu_worker.forwards import Forwards
from gpu_worker.interposer import interposable, restore
from gpu_worker.limits import Limits, memory_of
from gpu_worker.pace import pace_of
from gpu_worker.pipelines import device_of, settled
from gpu_worker.schedulers import timed_on_host
from gpu_worker.transfer import unwaited
from scripts import true_architectures
from scripts.true_architectures import BETAS

SCHEDULERS = [
    ("EulerDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
]
DEMO = Path(__file__).resolve().parent.parent / "gpu_worker/demo/checkpoint"
TINY_BLOCKS = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 4}
UNETS: Mapping[str, dict[str, Any]] = true_architectures.UNETS | {
    "tiny_sd15": TINY_BLOCKS
    | {
        "sample_size": 8,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "tiny_sdxl": TINY_BLOCKS
    | {
        "sample_size": 8,
        "cross_attention_dim": 64,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}
POOLED = {"sdxl": 1280, "tiny_sdxl": 32}


@dataclass
class Checkpoint:
    """A stock pipeline without text encoders: jobs bring their prompts as embeddings."""

    name: str
    pipe: Any
    dtype: torch.dtype

    @classmethod
    def random(cls, name: str, device: torch.device, seed: int) -> "Checkpoint":
        torch.manual_seed(seed)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        with torch.device(device):
            unet = diffusers.UNet2DConditionModel(**UNETS[name]).to(dtype).eval()
            # Only its scale counts: latents are not decoded.
            vae = diffusers.AutoencoderKL(
                block_out_channels=(8,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                norm_num_groups=4,
                latent_channels=4,
            ).to(dtype)
        return cls._of(name, unet, vae)

    @classmethod
    def demo(cls, device: torch.device) -> "Checkpoint":
        """The trained one that comes along."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(DEMO).to(device)
        return cls._of("demo", pipe.unet, pipe.vae)

    @classmethod
    def _of(cls, name: str, unet: Any, vae: Any) -> "Checkpoint":
        parts = {"unet": unet, "vae": vae, "text_encoder": None, "tokenizer": None}
        return cls(name, pipeline(name, parts, SCHEDULERS[0]), unet.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.pipe.unet.parameters()).device


def pipeline(name: str, parts: dict[str, Any], scheduler: tuple[str, dict[str, Any]]) -> Any:
    kind, settings = scheduler
    parts = parts | {"scheduler": getattr(diffusers, kind)(**BETAS, **settings)}
    if name in POOLED:
        seconds = {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.StableDiffusionXLPipeline(**parts | seconds, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_served(made: Any) -> Any:
    """The pipeline as the worker prepares it."""
    timed_on_host(made.scheduler)
    made.__class__ = settled(type(made), device_of(made.components.values()))
    return made


@dataclass
class Job:
    """One picture: its own prompt, seed, steps and scheduler. `height` and `width` in pixels."""

    checkpoint: Checkpoint
    seed: int
    steps: int
    height: int
    width: int
    scheduler: tuple[str, dict[str, Any]]
    is_stock: bool = True

    def served(self) -> torch.Tensor:
        """As the worker runs it."""
        return replace(self, is_stock=False).run()

    def pipeline(self) -> Any:
        """A pipeline and a scheduler of its own, over the checkpoint's modules."""
        own = self.checkpoint.pipe.components
        parts = {name: own[name] for name in ("unet", "vae", "text_encoder", "tokenizer")}
        made = pipeline(self.checkpoint.name, parts, self.scheduler)
        return made if self.is_stock else as_served(made)

    def run(self) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        output: torch.Tensor = self.pipeline()(
            **self.embeddings(generator),
            num_inference_steps=self.steps,
            height=self.height,
            width=self.width,
            generator=generator,
            output_type="latent",
        ).images
        return output

    def embeddings(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        def drawn(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator)
            return values.to(self.checkpoint.device, self.checkpoint.dtype)

        name = self.checkpoint.name
        width = self.checkpoint.pipe.unet.config.cross_attention_dim
        given = {
            "prompt_embeds": drawn(1, 77, width),
            "negative_prompt_embeds": drawn(1, 77, width),
        }
        if name in POOLED:
            given["pooled_prompt_embeds"] = drawn(1, POOLED[name])
            given["negative_pooled_prompt_embeds"] = drawn(1, POOLED[name])
        return given


def jobs_of(
    checkpoints: Sequence[Checkpoint], sizes: Sequence[tuple[int, int]], count: int, steps: int
) -> list[Job]:
    """Jobs that differ in everything; step counts vary around `steps`."""
    return [
        Job(
            checkpoints[index % len(checkpoints)],
            seed=index,
            steps=steps + (index % 5) - 2,
            height=sizes[index // len(checkpoints) % len(sizes)][0],
            width=sizes[index // len(checkpoints) % len(sizes)][1],
            scheduler=SCHEDULERS[index // 2 % len(SCHEDULERS)],
        )
        for index in range(count)
    ]


def stock(jobs: Sequence[Job]) -> list[torch.Tensor]:
    return [job.run() for job in jobs]


def batched(jobs: Sequence[Job], callers: int) -> list[torch.Tensor]:
    """`callers` jobs at a time; the next begins when one ends."""
    device = jobs[0].checkpoint.device
    forwards = Forwards(Limits(memory=memory_of(device)), pace=pace_of(device))
    engine = Engine(forwards, callers, around=unwaited(device))
    parts = [part for job in jobs for part in interposable(job.checkpoint.pipe.components.values())]
    for module, method in parts:
        engine.adopt(module, method)
    results: dict[int, torch.Tensor] = {}

    def fail(error: Exception) -> None:
        raise error

    for index, job in enumerate(jobs):
        keep = lambda result, index=index: results.__setitem__(index, result)  # noqa: E731
        engine.submit(Task(index, job.served, finished=keep, failed=fail))
    engine.run_until_idle()
    engine.close()
    for module, _ in parts:
        restore(module)
    return [results[index] for index in range(len(jobs))]


def timed(run: Callable[[], Any], repeats: int = 2) -> tuple[float, Any]:
    """The best of some runs in seconds, and the last one's result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        result = run()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best, result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(label: str, jobs: list[Job], callers: Sequence[int], repeats: int) -> None:
    """Prints stock one at a time, then the engine with so many callers."""
    steps = sum(job.steps for job in jobs)
    warm_up = [replace(job, steps=3) for job in jobs]
    stock(warm_up[:2])
    seconds, expected = timed(lambda: stock(jobs), 1 if repeats == 1 else repeats - 1)
    row(label, "stock, one at a time", steps / seconds, 1.0, "")
    for count in callers:
        batched(warm_up, count)
        engine_seconds, results = timed(lambda count=count: batched(jobs, count), repeats)  # type: ignore[misc]
        pairs = zip(results, expected, strict=True)
        apart = max(float((one - other).abs().max() / other.std()) for one, other in pairs)
        note = f"latents differ by {apart:.1e} of their deviation at most"
        row(
            label,
            f"engine, {count} callers",
            steps / engine_seconds,
            seconds / engine_seconds,
            note,
        )


def row(label: str, how: str, rate: float, ratio: float, note: str) -> None:
    print(f"| {label:34} | {how:21} | {rate:8.1f} it/s | {ratio:6.2f} x | {note}", flush=True)


class Nothing(torch.nn.Module):
    """A denoiser that costs nothing, so that only the engine's own time is left."""

    def forward(self, sample: torch.Tensor, timestep: int, states: torch.Tensor) -> Any:
        return (sample,)


def overhead_milliseconds(device: torch.device, callers: int, steps: int = 300) -> float:
    """The engine's time per job and step."""
    module = Nothing()
    sample = torch.randn(2, 4, 8, 8, device=device)
    states = torch.randn(2, 77, 32, device=device)

    def body() -> None:
        for step in range(steps):
            module(sample, step, states)

    engine = Engine()
    engine.adopt(module, "forward", Layout("sample", scalars=frozenset({"timestep"})))
    for job in range(callers):
        engine.submit(Task(job, body))
    began = time.perf_counter()
    engine.run_until_idle()
    synchronize()
    return (time.perf_counter() - began) / (callers * steps) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="mean of the jobs")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_grad_enabled(False)
    # One thread: stock and engine then share a busy host alike.
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    for callers in (1, 8):
        cost = overhead_milliseconds(device, callers)
        print(f"engine's own time: {cost:.3f} ms per job and step, {callers} callers", flush=True)
    true = device.type == "cuda"
    small, large = (512, 1024) if true else (64, 64)
    prefix = "" if true else "tiny_"

    first = Checkpoint.random(f"{prefix}sd15", device, 0)
    sd15 = f"{prefix}sd15 {small}x{small}"
    square, wide = (small, small), (small, small * 3 // 2)
    steps, repeats = options.steps, options.repeats
    compare(sd15, jobs_of([first], [square], 16, steps), (1, 8), repeats)
    compare(f"{sd15}, two sizes", jobs_of([first], [square, wide], 16, steps), (8,), repeats)
    second = Checkpoint.random(f"{prefix}sd15", device, 1)
    compare(f"{sd15}, two models", jobs_of([first, second], [square], 16, steps), (8,), repeats)
    del first, second
    xl = Checkpoint.random(f"{prefix}sdxl", device, 2)
    compare(
        f"{prefix}sdxl {large}x{large}", jobs_of([xl], [(large, large)], 8, steps), (1, 4), repeats
    )


if __name__ == "__main__":
    main()
