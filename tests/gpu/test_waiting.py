"""On a GPU: the engine's thread waits for the device where it should, and nowhere else."""

import inspect
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from gpu_worker.batching import Layout
from gpu_worker.engine import Engine, Task
from gpu_worker.forwards import Forwards
from gpu_worker.pace import pace_of
from gpu_worker.schedulers import timed_on_host
from gpu_worker.transfer import unwaited

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICE = "cuda:0"
CYCLES = 100_000_000
STEPS = 6
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
]


class Slow(torch.nn.Module):
    """Keeps the device busy, not the thread."""

    def forward(self, sample: torch.Tensor, timestep: int) -> tuple[torch.Tensor]:
        torch.cuda._sleep(CYCLES)
        return (sample + 1,)


def seconds_of_one() -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(CYCLES)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def test_a_lone_job_orders_one_step_ahead_and_no_more() -> None:
    module, sample, begun = Slow(), torch.zeros(1, 4, device=DEVICE), list[float]()
    each = min(seconds_of_one() for _ in range(3))

    def body() -> None:
        for step in range(STEPS):
            begun.append(time.perf_counter())
            module(sample, step)

    engine = Engine(Forwards(pace=pace_of(torch.device(DEVICE))))
    engine.adopt(module, "forward", Layout("sample", scalars=frozenset({"timestep"})))
    module(sample, 0)  # its kernels are loaded
    torch.cuda.synchronize()
    engine.submit(Task("job", body))
    engine.run_until_idle()
    assert begun[1] - begun[0] < 0.5 * each
    assert begun[-1] - begun[0] > 0.9 * (STEPS - 2) * each


@pytest.fixture
def _waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def stepped(scheduler: Any, takes_generator: bool, mode: str) -> torch.Tensor:
    """Latents after some steps in float16; `mode` is what torch does where it waits."""
    scheduler.set_timesteps(STEPS, device=DEVICE)
    seed = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=seed).to(DEVICE, torch.float16)
    taken = {"generator": seed} if takes_generator else {}
    for timestep in scheduler.timesteps:
        torch.cuda.set_sync_debug_mode(mode)
        noise = scheduler.scale_model_input(latents, timestep) * 0.1
        latents = scheduler.step(noise, timestep, latents, **taken).prev_sample
        torch.cuda.set_sync_debug_mode("default")
    return latents


@pytest.mark.usefixtures("_waiting_is_allowed_again")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_does_not_wait_for_the_device_and_is_stock_diffusers_own(name: str) -> None:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind: Any = getattr(diffusers, name)
    takes_generator = "generator" in inspect.signature(kind.step).parameters
    with torch.no_grad():
        expected = stepped(kind(**settings), takes_generator, "default")
        with unwaited(torch.device(DEVICE)):
            made = stepped(timed_on_host(kind(**settings)), takes_generator, "error")
    assert torch.equal(made, expected)


@pytest.mark.usefixtures("_waiting_is_allowed_again")
def test_a_copy_from_the_host_is_not_waited_for() -> None:
    numbers, device = torch.randn(3, 5), torch.device(DEVICE)
    expected = numbers.to(device), numbers.to(device, torch.float16)
    with unwaited(device):
        torch.cuda.set_sync_debug_mode("error")
        whole, half = numbers.to(DEVICE), numbers.to(dtype=torch.float16, device=device)
        made = torch.tensor([1.5, 2.0], device=DEVICE)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(numbers.to(torch.float64).float(), numbers)
    assert torch.equal(whole, expected[0])
    assert torch.equal(half, expected[1])
    assert made.tolist() == [1.5, 2.0]
