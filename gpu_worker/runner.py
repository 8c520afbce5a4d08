"""Jobs one at a time: load, call the pipeline once per picture, encode beside it, answer.

Owns the thread that touches the device. Pictures are encoded on threads of their own.
"""

import os
import queue
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import assert_never

import torch

from gpu_worker import device, failures, images, models, pipelines
from gpu_worker.failures import JobCancelled
from gpu_worker.library import Library
from gpu_worker.loop import EXIT_FATAL, Send, Work
from gpu_worker.models import Models
from gpu_worker.pipelines import PreparedCall, Result
from gpu_worker.progress import JobProgress
from ipc.messages import (
    Fatal,
    Finished,
    Generate,
    Load,
    Phase,
    Picture,
    Progress,
    Residency,
    Start,
    Unload,
)

ENCODER_THREADS = 2


@dataclass
class Job:
    """A job that was taken on, and whether it has been cancelled since."""

    work: Work
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises JobCancelled."""
        if self.cancelled.is_set():
            raise JobCancelled


class SequentialRunner:
    """Runs one job after the other on a thread of its own."""

    def __init__(self, start: Start, send: Send) -> None:
        self._send = send
        self._start = start
        self._jobs: dict[str, Job] = {}
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(ENCODER_THREADS, "encode")
        self._library = Library(
            start.device, device.dtype(start), device.budget_bytes(start), self._tell_residency
        )
        device.quiet_libraries()
        send(device.ready(start))
        self._tell_residency()
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def submit(self, work: Work) -> None:
        job = Job(work)
        self._jobs[work.job] = job
        self._queue.put(job)

    def cancel(self, job: str) -> None:
        if (known := self._jobs.get(job)) is not None:
            known.cancelled.set()

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            job = self._queue.get()
            try:
                job.check()
                self._do(job)
            except BaseException as error:
                self._answer(job, error)
            self._jobs.pop(job.work.job, None)

    def _answer(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, (JobCancelled, failures.Refusal)):
            traceback.print_exception(error)
        answer = failures.outcome(job.work.job, error, given_names(job.work))
        if failures.is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)
            device.free(self._start)
        self._send(answer)
        if isinstance(answer, Fatal):
            sys.stderr.flush()
            os._exit(EXIT_FATAL)

    def _do(self, job: Job) -> None:
        match job.work:
            case Generate():
                self._generate(job, job.work)
            case Load():
                self._load(job, job.work)
            case Unload():
                self._library.unload(job.work.checkpoint.path)
                self._send(Finished(job=job.work.job))
            case _:
                assert_never(job.work)

    def _load(self, job: Job, work: Load) -> None:
        began = time.monotonic()
        self._phase(work.job, "loading")
        holding = self._library.checkpoint(work.checkpoint, job.check)
        if work.vae is not None:
            with self._library.use(holding):
                models.load_vae(work.vae, self._library, holding)
        self._send(Finished(job=work.job, load_seconds=time.monotonic() - began))

    def _generate(self, job: Job, work: Generate) -> None:
        began = time.monotonic()
        self._phase(work.job, "loading")
        wanted = models.load(work, self._library, job.check)
        with self._library.use(*wanted):
            self._library.adapt(wanted.checkpoint, wanted.loras)
            loaded = time.monotonic()
            progress = self._progress(job, work, wanted)
            encodings = self._pictures(work, wanted, progress)
        self._send(
            Finished(
                job=work.job,
                load_seconds=loaded - began,
                generation_seconds=time.monotonic() - loaded,
                encode_seconds=sum(encoding.result() for encoding in encodings),
                step_seconds=progress.step_seconds,
            )
        )

    def _progress(self, job: Job, work: Generate, wanted: Models) -> JobProgress:
        channels = getattr(getattr(wanted.decoder, "config", None), "latent_channels", None)
        factors = images.fitting_factors(work.checkpoint.family, channels)
        return JobProgress(work, job.check, self._send, self._encoders, factors)

    def _pictures(
        self, work: Generate, wanted: Models, progress: JobProgress
    ) -> list[Future[float]]:
        """Makes the pictures; all are encoded and sent when this returns or raises."""
        encodings: list[Future[float]] = []
        try:
            for call in pipelines.prepare(work, wanted):
                watch = progress.calls[call.index]
                watch.encodes()
                result = call.run(watch)
                encodings.append(self._encoders.submit(self._encode, work, call, result))
        finally:
            wait(encodings)
        return encodings

    def _encode(self, work: Generate, call: PreparedCall, result: Result) -> float:
        began = time.monotonic()
        data = images.encoded(
            result.picture, work.output_format, call.call.metadata, work.output_quality
        )
        seconds = time.monotonic() - began
        self._send(Picture(job=work.job, index=call.index, data=data, nsfw=result.nsfw))
        return seconds

    def _phase(self, job: str, phase: Phase) -> None:
        self._send(Progress(job=job, phase=phase))

    def _tell_residency(self) -> None:
        models = self._library.residents()
        self._send(Residency(models=models, memory=device.memory(self._start)))


def given_names(work: Work) -> set[str]:
    """The names of the parameters and pictures that a request gives."""
    if not isinstance(work, Generate):
        return set()
    return {*work.parameters, *work.images, *work.calls[0].parameters}
