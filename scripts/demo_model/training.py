"""What every training stage shares: its plan, its clock, its optimiser step, and quiet files."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """How much work one stage does: it ends at `steps` or after `seconds`, whichever is first."""

    batch: int
    rate: float
    steps: int
    seconds: float
    scenes: int
    """Scenes drawn ahead; they are seen again and again, each time with fresh noise."""
    tokens: int = 77
    """Tokens that the text stage sees of each caption; fewer are faster on a CPU."""
    until: float = math.inf
    """When to end whatever is left, in seconds since the epoch: for stages that wait for others."""


@dataclass(frozen=True)
class Context:
    """Where and how this process trains."""

    work: Path
    device: torch.device
    seed: int
    compiled: bool
    start: Path | None = None
    """An exported checkpoint whose UNet and VAE to begin with, instead of random weights."""

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16 on a GPU; a CPU is faster in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def generator(self, stage: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return random numbers of this seed and stage, the same whichever stages ran before."""
        offset = sum(ord(letter) * 31**place for place, letter in enumerate(stage)) % 2**31
        return torch.Generator(device).manual_seed(self.seed + offset)


class Trainer:
    """Steps an AdamW optimiser through a plan: a short warm-up, then a cosine down to nothing."""

    def __init__(self, name: str, parameters: Iterator[nn.Parameter], plan: Plan) -> None:
        self.name, self.plan = name, plan
        self.parameters = [p for p in parameters if p.requires_grad]
        fused = self.parameters[0].is_cuda
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused
        )
        self.step, self._started, self._earlier_seconds = 0, time.monotonic(), 0.0
        self._ceiling = plan.seconds

    @property
    def seconds(self) -> float:
        """Seconds spent training, earlier runs of the same state included."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the plan that is done, 0..1, in steps or in seconds, whichever is further."""
        return min(1.0, max(self.step / self.plan.steps, self.seconds / self._ceiling))

    def run(self, loss: Callable[[], Tensor], after: Callable[[], None] = lambda: None) -> None:
        """Take steps until the plan is done, printing the loss now and then."""
        self._started = time.monotonic()
        left = max(1.0, self.plan.until - time.time())
        self._ceiling = min(self.plan.seconds, self._earlier_seconds + left)
        average = math.nan
        while self.progress < 1:
            value = self.take_step(loss())
            after()
            if self.step % 50 == 0 or self.step == 1:
                current = float(value)  # waits for the device, so that the clock is honest
                average = current if math.isnan(average) else 0.8 * average + 0.2 * current
            if self.step % 250 == 0 or self.step == 1:
                self.say(f"step {self.step} loss {average:.4f}")
        self.say(f"done after {self.step} steps, loss {average:.4f}")

    def take_step(self, loss: Tensor) -> Tensor:
        """Update the weights once; return the loss, detached."""
        warm = min(1.0, (self.step + 1) / min(200, max(1, self.plan.steps // 10)))
        rate = self.plan.rate * warm * (0.5 + 0.5 * math.cos(math.pi * self.progress))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    def say(self, text: str) -> None:
        """Print a line with the stage's name and its seconds."""
        print(f"[{self.name} {self.seconds:5.1f}s] {text}", flush=True)

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs."""
        return {
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Carry on where `state` was taken."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self._earlier_seconds = state["step"], state["seconds"]


def wait_for(path: Path) -> Path:
    """Wait until another process has made `path`: stages may overlap on one device."""
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder that takes the place of `path` only when all is written."""
    draft = path.with_name(path.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)
