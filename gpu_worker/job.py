"""One job in the worker: what of it is still under way, how it goes, its one last message."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gpu_worker import failures
from gpu_worker.failures import JobCancelled, Outcome
from gpu_worker.loop import Work
from gpu_worker.models import Models
from gpu_worker.pipelines import PreparedCall
from gpu_worker.progress import JobProgress
from ipc.messages import Finished, Generate


@dataclass(eq=False)
class Job:
    """Used on the device thread alone, but for `cancelled`.

    `under_way` counts its tasks and its pictures' encodings; with the last of them the
    job is over. The first error is the one that is told.
    """

    work: Work
    over: Callable[["Job"], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    under_way: int = 0
    told: bool = False
    """Whether it was said that the job has begun."""
    error: BaseException | None = None
    progress: JobProgress | None = None
    calls: list[PreparedCall] | None = None
    memory_fallback: str | None = None
    forwards: int = 0
    company: int = 0
    began: float = field(default_factory=time.monotonic)
    loaded: float | None = None
    encode_seconds: float = 0.0

    @property
    def id(self) -> str:
        return self.work.job

    def check(self) -> None:
        """Raises JobCancelled."""
        if self.cancelled.is_set():
            raise JobCancelled

    def opened(self) -> None:
        self.under_way += 1

    def closed(self, error: BaseException | None = None) -> None:
        self.error = self.error or error
        self.under_way -= 1
        if not self.under_way:
            self.over(self)

    def prepared(self, prepare: Callable[[Models], list[PreparedCall]], models: Models,
                 index: int) -> PreparedCall:  # fmt: skip
        """The call of one picture; the calls are prepared with the first picture."""
        if self.calls is None:
            self.loaded = time.monotonic()
            self.calls = prepare(models)
        return self.calls[index]

    def answer(self) -> Outcome | Finished:
        """The last message."""
        if self.error is not None:
            return failures.outcome(self.id, self.error, given_names(self.work))
        now = time.monotonic()
        loaded = now if self.loaded is None else self.loaded
        return Finished(
            job=self.id,
            load_seconds=loaded - self.began,
            generation_seconds=now - loaded,
            encode_seconds=self.encode_seconds,
            step_seconds=self.progress.step_seconds if self.progress else None,
            memory_fallback=self.memory_fallback,
            batch_rows=self.company / self.forwards if self.forwards else None,
        )


def given_names(work: Work) -> set[str]:
    """The names of the parameters and pictures that a request gives."""
    if not isinstance(work, Generate):
        return set()
    return {*work.parameters, *work.images, *work.calls[0].parameters}
