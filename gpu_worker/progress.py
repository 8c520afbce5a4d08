"""How far a job is, over all of its pictures; previews on the way; where it is cancelled."""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from gpu_worker import images
from gpu_worker.loop import Send
from ipc.messages import Generate, Phase, Preview, Progress

Factors = tuple[tuple[float, ...], ...] | None


def preview_steps(previews: int, steps: int) -> set[int]:
    """The steps after which to send one of `previews` previews, spread evenly."""
    wanted = {round(number * steps / (previews + 1)) for number in range(1, previews + 1)}
    return wanted - {0, steps}


@dataclass
class JobProgress:
    """Counts the steps of all of a job's calls. `check` raises JobCancelled."""

    work: Generate
    check: Callable[[], None]
    send: Send
    encoders: Executor
    factors: Factors = None

    def __post_init__(self) -> None:
        self.calls = [CallProgress(self, index) for index in range(len(self.work.calls))]

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds per step so far."""
        steps = sum(call.steps_done for call in self.calls)
        return sum(call.seconds for call in self.calls) / steps if steps else None

    def tell(self, phase: Phase) -> None:
        self.check()
        step = sum(call.steps_done for call in self.calls)
        longest = max(call.steps for call in self.calls)
        steps = sum(call.steps or longest for call in self.calls)
        progress = Progress(job=self.work.job, phase=phase, step=step, steps=steps)
        self.send(progress, self.work.progress_seconds)

    def preview(self, index: int, latents: Any) -> None:
        picture = images.preview(latents, self.factors)
        self.encoders.submit(self._send_preview, index, picture)

    def _send_preview(self, index: int, picture: Any) -> None:
        self.send(Preview(job=self.work.job, index=index, data=images.preview_data(picture)))


class CallProgress:
    """The steps of one call: those of its loops one after the other."""

    def __init__(self, job: JobProgress, index: int) -> None:
        self._job = job
        self._index = index
        self._earlier = 0
        self._loop = 0
        self._done = 0
        self._loop_began = 0.0
        self._earlier_seconds = 0.0
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """As far as is known; 0 before the first loop begins."""
        return self._earlier + self._loop

    @property
    def steps_done(self) -> int:
        return self._earlier + self._done

    def encodes(self) -> None:
        self._job.tell("encoding")

    def begins(self, steps: int) -> None:
        self._earlier += self._loop
        self._loop, self._done = steps, 0
        self._earlier_seconds, self._loop_began = self.seconds, time.monotonic()
        self._job.check()

    def stepped(self, done: int, steps: int, latents: Any) -> None:
        self._done, self._loop = done, steps
        self.seconds = self._earlier_seconds + time.monotonic() - self._loop_began
        self._job.tell("denoising")
        if done in preview_steps(self._job.work.previews, steps) and can_be_shown(latents):
            self._job.preview(self._index, latents)
        if done >= steps:
            self._job.tell("decoding")


def can_be_shown(latents: Any) -> bool:
    """Latents of one picture as (1, channels, height, width); packed ones cannot be."""
    return latents is not None and latents.ndim == 4
