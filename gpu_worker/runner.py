"""Jobs as tasks of the engine: a task a picture, models loaded and pictures encoded beside it.

Owns the thread that touches the device. Everything else comes to it through an inbox.
"""

import gc
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch

from gpu_worker import compilers, device, failures, images, models, pipelines
from gpu_worker.aftermath import Aftermath
from gpu_worker.claims import claims_of, wait_for_room
from gpu_worker.company import needs_to_be_alone
from gpu_worker.compilers import Compiler, Stalls
from gpu_worker.engine import Engine, Task
from gpu_worker.failures import JobCancelled
from gpu_worker.forwards import Forwards
from gpu_worker.interposer import interposable
from gpu_worker.job import Job
from gpu_worker.library import Library
from gpu_worker.limits import Limits, memory_of
from gpu_worker.loader import Loader
from gpu_worker.loop import EXIT_FATAL, Send, Work
from gpu_worker.models import Models
from gpu_worker.pace import pace_of
from gpu_worker.pipelines import PreparedCall, Result
from gpu_worker.progress import JobProgress
from gpu_worker.transfer import OnDevice, unwaited
from ipc.messages import Fatal, Generate, Load, Picture, Progress, Residency, Start, Unload

ENCODER_THREADS = 2
RESIDENCY_SECONDS = 0.1
"""Where a checkpoint is exchanged for another on the host, one message tells of both."""
CAPACITY = 8
"""Jobs at a time; the engine runs up to engine.MAX_RUNNING pictures of them."""

Made = tuple[PreparedCall, Result]


class BatchingRunner:
    """Runs jobs together: pictures of different jobs share the denoiser's steps."""

    def __init__(self, start: Start, send: Send) -> None:
        self._send = send
        self._start = start
        self._jobs: dict[str, Job] = {}
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(ENCODER_THREADS, "encode")
        self._compiler = compiler(start, self._stalls)
        self._loader = Loader(self._made_library)
        place = torch.device(start.device)
        limits = Limits(buckets=self._compiler.buckets, memory=memory_of(place))
        forwards = Forwards(limits, self._compiler.run, self._evict, pace_of(place))
        wake = partial(self._inbox.put, _nothing)
        self._engine = Engine(forwards, wake=wake, around=unwaited(place))
        self._aftermath = Aftermath(start, self._engine, self._loader, self._compiler, send)
        device.quiet_libraries()
        device.use_threads()
        # What was imported never becomes garbage: no collection has to look at it again.
        gc.freeze()
        send(device.ready(start, CAPACITY))
        self._loader.call(self._tell_residency).result()
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def submit(self, work: Work) -> None:
        job = Job(work, self._over)
        self._jobs[work.job] = job
        self._inbox.put(partial(self._begin, job))

    def cancel(self, job: str) -> None:
        if (known := self._jobs.get(job)) is not None:
            known.cancelled.set()
            self._inbox.put(partial(self._engine.cancel, job))

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        try:
            while True:
                self._take(waits=not self._engine.round())
        except BaseException as error:
            # A defect of the worker's own: nobody would answer its jobs any more.
            traceback.print_exception(error)
            self._end(Fatal(reason="engine", detail=f"cannot go on: {failures.speakable(error)}"))

    def _take(self, waits: bool) -> None:
        """Does what has come in; waits for something where there is nothing else to do."""
        if waits:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _begin(self, job: Job) -> None:
        try:
            tasks = self._tasks(job)
        except failures.Refusal as error:
            job.opened()
            job.closed(error)
            return
        for task in tasks:
            job.opened()
            task.failed = partial(self._failed, job)
            task.cancelled = partial(job.closed, JobCancelled())
            self._engine.submit(task)

    def _tasks(self, job: Job) -> list[Task]:
        match job.work:
            case Generate():
                indices = range(len(job.work.calls))
                return [self._picture_task(job, job.work, index) for index in indices]
            case Load():
                return [self._load_task(job, job.work)]
            case Unload():
                path = job.work.checkpoint.path
                body = partial(self._called, partial(self._loader.library.unload, path))
                # It waits until no job uses the checkpoint.
                return [Task(job.id, body, lambda _: job.closed(), claims={path: object()})]
            case _:
                assert_never(job.work)

    def _called(self, function: Callable[[], Any]) -> Any:
        return self._engine.wait_for(self._loader.call(function))

    def _load_task(self, job: Job, work: Load) -> Task:
        task = Task(job.id, lambda: self._load(job, work, task), lambda _: job.closed())
        return task

    def _load(self, job: Job, work: Load, task: Task) -> None:
        with self._held(job, task, partial(models.loaded, work, self._loader.library, job.check)):
            pass  # it stays there until it has to make room

    def _picture_task(self, job: Job, work: Generate, index: int) -> Task:
        kind: Any = pipelines.pipeline_class(work.pipeline)
        task = Task(
            job.id,
            lambda: self._picture(job, work, index, task),
            lambda made: self._made(job, work, task, made),
            priority=work.priority,
            # One that changes its modules for a while runs what nothing was compiled for.
            deterministic=work.deterministic or needs_to_be_alone(kind),
            alone=work.alone or needs_to_be_alone(kind),
            claims=claims_of(work),
        )
        return task

    def _picture(self, job: Job, work: Generate, index: int, task: Task) -> Made:
        """The body of a task: from loading to pixels."""
        read = partial(models.adapted, work, self._loader.library, job.check)
        with self._held(job, task, read) as wanted:
            call = job.prepared(partial(pipelines.prepare, work), wanted, index)
            self._adopt(call, wanted)
            job.progress = job.progress or self._progress(job, work, wanted)
            watch = job.progress.calls[index]
            watch.encodes()
            return call, call.run(watch)

    @contextmanager
    def _held(self, job: Job, task: Task, read: Callable[[], Models]) -> Iterator[Models]:
        """The models that a task needs. While they wait for room, no other task begins with
        checkpoints that are in the way."""
        if not job.told:
            job.told = True
            late = job.work.progress_seconds if isinstance(job.work, Generate) else 0.0
            self._send(Progress(job=job.id, phase="loading"), late)
        alone, claims, told = task.alone, task.claims, list[tuple[str, ...]]()

        def put_off(missing_bytes: int) -> None:
            needed = {job.work.checkpoint.path, *map(str, claims)}
            in_the_way = self._loader.library.in_the_way(missing_bytes, needed)
            wait_for_room(task, claims, told, in_the_way)

        held = self._loader.hold(read, put_off)
        try:
            wanted = self._engine.wait_for(held).models
            task.alone, task.claims = alone, claims
            yield wanted
        finally:
            self._loader.give_back(held)

    def _adopt(self, call: PreparedCall, wanted: Models) -> None:
        parts = [call.base.pipeline.components]
        if call.refiner is not None:
            parts.append(call.refiner.pipeline.components)
        if wanted.safety_checker is not None:
            parts.append(wanted.safety_checker.parts)
        for module, method in interposable(each for part in parts for each in part.values()):
            self._engine.adopt(module, method)

    def _progress(self, job: Job, work: Generate, wanted: Models) -> JobProgress:
        channels = getattr(getattr(wanted.decoder, "config", None), "latent_channels", None)
        factors = images.fitting_factors(work.checkpoint.family, channels)
        return JobProgress(work, job.check, self._send, self._encoders, factors)

    def _made(self, job: Job, work: Generate, task: Task, made: Made) -> None:
        job.memory_fallback = task.memory_fallback or job.memory_fallback
        job.forwards += task.forwards
        job.company += task.company
        encoding = self._encoders.submit(self._encode, work, *made)
        encoding.add_done_callback(
            lambda done: self._inbox.put(partial(self._encoded, job, done)),
        )

    def _encode(self, work: Generate, call: PreparedCall, result: Result) -> float:
        began = time.monotonic()
        picture = result.picture
        if isinstance(picture, OnDevice):
            picture = picture.picture()
        data = images.encoded(picture, work.output_format, call.call.metadata, work.output_quality)
        seconds = time.monotonic() - began
        made = Picture(job=work.job, index=call.index, data=data, nsfw=result.nsfw)
        self._send(made, work.progress_seconds)
        return seconds

    def _encoded(self, job: Job, done: "Future[float]") -> None:
        error = done.exception()
        if error is None:
            job.encode_seconds += done.result()
            job.closed()
        else:
            self._failed(job, error)

    def _failed(self, job: Job, error: BaseException) -> None:
        """One picture failed: the job's others are not needed any more."""
        self._engine.cancel(job.id)
        job.closed(error)

    def _over(self, job: Job) -> None:
        """The job's last message."""
        error = job.error
        if error is not None and not isinstance(error, (JobCancelled, failures.Refusal)):
            traceback.print_exception(error)
        answer = job.answer()
        if error is not None and failures.is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)
            self._aftermath.ran_out()
        self._jobs.pop(job.id, None)
        if isinstance(answer, Fatal):
            self._end(answer)
        self._send(answer)

    def _end(self, last_words: Fatal) -> None:
        self._send(last_words)
        sys.stderr.flush()
        os._exit(EXIT_FATAL)

    def _evict(self) -> bool:
        """The order in which things give way: graphs, then idle models; then batches are cut."""
        if self._compiler.give_way():
            return True
        return self._loader.call(self._loader.library.drop_idle).result()

    def _stalls(self) -> None:
        """A module is about to be traced: so that nobody takes that for a hang, jobs load again."""
        for job in list(self._jobs.values()):
            if job.told:
                self._send(Progress(job=job.id, phase="loading"))

    def _made_library(self) -> Library:
        start = self._start
        budget = device.budget_bytes(start)
        dtype, host = device.dtype(start), device.host_bytes(start)
        layout = self._compiler.memory_format
        return Library(start.device, dtype, budget, self._tell_residency, host, layout)

    def _tell_residency(self) -> None:
        models = self._loader.library.residents()
        told = Residency(models=models, memory=device.memory(self._start))
        self._send(told, RESIDENCY_SECONDS)


def compiler(start: Start, stalls: Stalls) -> Compiler:
    """Raises CannotCompile."""
    cache = None if start.cache_dir is None else Path(start.cache_dir) / "inductor"
    backend, graphs = start.compile_backend, start.cuda_graph
    return compilers.build(backend, graphs, start.device, cache, stalls)


def _nothing() -> None:
    """Put into the inbox so that whoever waits there looks around."""
