"""A toy denoiser, a pipeline in small, and an engine that runs them."""

from typing import Any

import torch

from gpu_worker.batching import Layout
from gpu_worker.engine import Engine, Task

LAYOUT = Layout("sample", scalars=frozenset({"timestep"}))
MEMORY_ROWS = 7


class Denoiser(torch.nn.Module):
    """Each row's step depends on its own entries only. Negative entries are not borne."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.rows: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: Any, bias: float = 0.0) -> Any:
        if sample.shape[0] > MEMORY_ROWS:
            raise torch.OutOfMemoryError("out of memory")
        if (sample < 0).any():
            raise ValueError("cannot bear negative entries")
        self.rows.append(sample.shape[0])
        timesteps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1)
        return {"sample": sample * self.factor + timesteps + bias}


def denoised(denoiser: Denoiser, seed: int, rows: int, steps: int, bias: float) -> torch.Tensor:
    """What a pipeline does, in small: several calls, something of its own in between."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.rand(rows, 3, generator=generator)
    for step in range(steps):
        sample = denoiser(sample, step, bias=bias)["sample"]
        sample = sample + torch.rand(rows, 3, generator=generator)
    return sample


def engine_of(*denoisers: Denoiser, **options: Any) -> Engine:
    engine = Engine(**options)
    for denoiser in denoisers:
        engine.adopt(denoiser, "forward", LAYOUT)
    return engine


def step_task(denoiser: Denoiser, job: Any, steps: int, **options: Any) -> Task:
    return Task(job, lambda: denoised(denoiser, 0, 1, steps, 0.0), **options)
