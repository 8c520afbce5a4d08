"""The workers and the queue: turns events into state changes and actions.

One method per past-tense event; the decisions are in states, placement, jobs and
worker. The life of a process (spawning, pipes, reaping) is in lives.py, which
calls the event methods here. Everything runs on the event loop's thread.
"""

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable
from typing import assert_never

import msgspec

from ipc import messages
from supervisor import placement
from supervisor.errors import Problem
from supervisor.estimates import Estimates
from supervisor.jobs import Job, Loading, Outcome, Preview, Progress, Queued, in_order, overdue
from supervisor.settings import Settings
from supervisor.states import ImpossibleTransition, JobEvent, WorkerEvent, WorkerState
from supervisor.worker import Process, Worker
from supervisor.worker_process import Exit

log = logging.getLogger(__name__)

LAUNCH = "launch"
POISON_SECONDS = 600.0
FATAL_EXIT_SIGNALS = {-9, -15}


class Observer:
    """Told of what happens; the default does nothing. Metrics and webhooks listen here."""

    def job_ended(self, job: Job) -> None: ...
    def job_dispatched(self, job: Job, worker: Worker) -> None: ...
    def worker_exited(self, worker: Worker, reason: str) -> None: ...
    def models_changed(
        self,
        worker: Worker,
        loaded: list[messages.Resident],
        unloaded: list[messages.Resident],
    ) -> None: ...


class Fleet:
    """Submit, cancel, look: the narrow interface that the rest of the server uses."""

    def __init__(
        self,
        settings: Settings,
        devices: list[str],
        launch: messages.Load | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self.workers = {id: Worker(id, device) for id, device in enumerate(devices)}
        self.queued: dict[str, Job] = {}
        self.estimates = Estimates()
        self.observers: list[Observer] = []
        self.draining = False
        self._launch = launch
        self._now = clock
        self._draw = draw
        self._poison: dict[bytes, float] = {}
        self._restarting: list[Worker] = []

    # What others ask for.

    def submit(self, job: Job) -> None:
        """Accepts the job, or raises Problem. Its outcome comes with jobs.Ended."""
        self._admit(job)
        self.queued[job.id] = job
        self._dispatch()

    def cancel(self, job: Job) -> None:
        """Ends the job; its device stops within a step."""
        if not job.has_ended:
            problem = Problem("cancelled", "cannot go on: the job was cancelled")
            self._end(job, JobEvent.CANCELLED, Outcome(problem=problem))
            self._dispatch()

    def restart(self) -> None:
        """Replaces every worker, one after the other, each once its jobs are done."""
        self._restarting = [w for w in self.workers.values() if w not in self._restarting]
        self._restart_next()

    def drain(self) -> None:
        """Refuses new jobs from now on."""
        self.draining = True

    def stop(self) -> None:
        """Ends what is left: jobs are answered, workers told to exit."""
        self.draining = True
        problem = Problem("draining", "cannot go on: the server is stopping", retry_after=5)
        for job in [*self.queued.values(), *self._running()]:
            self._end(job, JobEvent.FAILED, Outcome(problem=problem))
        for worker in self.workers.values():
            if worker.state is not WorkerState.STOPPED:
                self._happened(worker, WorkerEvent.STOP_REQUESTED)

    @property
    def is_idle(self) -> bool:
        return not self.queued and not any(worker.running for worker in self.workers.values())

    def ready_workers(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.state is WorkerState.READY]

    def planned(self) -> dict[str, int]:
        """Queued jobs and the worker that each would run on as things stand."""
        return self._plan(self._ordered()).workers

    # Events of a worker's life.

    def worker_spawned(
        self, worker: Worker, process: Process, post: Callable[[messages.ToWorker], None]
    ) -> None:
        worker.began(process, post, self._now())
        if worker.state is not WorkerState.STARTING:  # told to stop while it was spawned
            process.kill()

    def worker_exited(self, worker: Worker, exit: Exit) -> None:
        now = self._now()
        was_wanted = worker.state in (WorkerState.STOPPING, WorkerState.KILLING)
        planned = was_wanted and worker.signalled and worker.fatal is None
        reason = worker.fatal.reason if worker.fatal else exit.in_words()
        started = worker.state is not WorkerState.STARTING
        jobs = worker.gone()
        self._happened(worker, WorkerEvent.EXITED)
        if not planned:
            worker.last_exit = reason
            worker.failures += 1
            worker.failed_starts = 0 if started else worker.failed_starts + 1
            log.warning("worker exited", extra={"worker": worker.id, "reason": reason})
        worker.restart_at = now + placement.restart_delay_seconds(worker.failures, self._draw())
        outside = exit.code in FATAL_EXIT_SIGNALS and not worker.signalled
        for job in jobs:
            self._worker_lost(job, len(jobs) == 1, outside, reason)
        for observer in self.observers:
            observer.worker_exited(worker, reason)
        if placement.is_hopeless(worker.failed_starts):
            self._happened(worker, WorkerEvent.GAVE_UP)
            log.error("worker quarantined", extra={"worker": worker.id, "reason": reason})
            self._fail_if_nobody_is_left()
        self._dispatch()

    def protocol_broken(self, worker: Worker, reason: str) -> None:
        worker.fatal = messages.Fatal(reason=reason, detail=reason)
        self._happened(worker, WorkerEvent.PROTOCOL_BROKEN)

    def received(self, worker: Worker, message: messages.FromWorker) -> None:
        """A message came from a worker; one out of turn ends it."""
        try:
            self._handle(worker, message)
        except ImpossibleTransition as error:
            self.protocol_broken(worker, f"spoke out of turn: {error}")

    def _handle(self, worker: Worker, message: messages.FromWorker) -> None:
        worker.moved_at = self._now()
        match message:
            case messages.Ready():
                self._worker_ready(worker, message)
            case messages.Residency():
                self._models_changed(worker, message)
            case messages.Fatal():
                worker.fatal = message
                self._happened(worker, WorkerEvent.FATAL_REPORTED)
            case messages.Progress() | messages.Preview() | messages.Picture():
                self._job_moved(worker, message)
            case (
                messages.Finished()
                | messages.Rejected()
                | messages.Failed()
                | messages.Cancelled()
            ):
                self._job_answered(worker, message)
            case _:
                assert_never(message)

    def ticked(self) -> None:
        """Some time has passed: looks after every deadline."""
        now = self._now()
        self._poison = {key: until for key, until in self._poison.items() if until > now}
        for job in overdue([*self.queued.values(), *self._running()], now):
            detail = "cannot finish the job within its time limit"
            problem = Problem("deadline_exceeded", detail, field="timeout_seconds")
            self._end(job, JobEvent.EXPIRED, Outcome(problem=problem))
        for worker in self.workers.values():
            self._look_after(worker, now)
        self._dispatch()

    # Workers.

    def _look_after(self, worker: Worker, now: float) -> None:
        if worker.is_stalled(self.settings, self._launch is not None, now):
            phase = "starting" if worker.state is WorkerState.STARTING else "its jobs"
            worker.fatal = messages.Fatal(reason=f"made no progress with {phase}", detail="")
            self._happened(worker, WorkerEvent.STALLED)
        elif worker.stop_is_overdue(now):
            self._happened(worker, WorkerEvent.STOP_TIMED_OUT)
            worker.state_since = now
        elif worker.term_is_due(now) and worker.process:
            worker.process.terminate()
        elif worker.state is WorkerState.DRAINING and not worker.running:
            self._happened(worker, WorkerEvent.DRAINED)
        elif worker.state is WorkerState.BACKING_OFF and now >= worker.restart_at:
            self._come_back(worker)
        elif worker.has_stayed_up(now):
            worker.failures = worker.failed_starts = 0

    def _come_back(self, worker: Worker) -> None:
        if self.draining and self.is_idle:
            self._happened(worker, WorkerEvent.STOP_REQUESTED)
        else:
            worker.restarts += 1
            self._happened(worker, WorkerEvent.BACKOFF_ELAPSED)

    def _happened(self, worker: Worker, event: WorkerEvent) -> None:
        before = worker.state
        worker.happened(event, self._now())
        if worker.state is WorkerState.KILLING and worker.process:
            worker.signalled = True
            worker.process.kill()
        if worker.state is WorkerState.STOPPING and before is not WorkerState.STOPPING:
            worker.signalled = worker.fatal is None
            worker.post(messages.Shutdown())

    def _worker_ready(self, worker: Worker, ready: messages.Ready) -> None:
        if ready.protocol != messages.PROTOCOL_VERSION:
            return self.protocol_broken(worker, f"speaks protocol {ready.protocol}")
        worker.name, worker.capacity = ready.device_name, ready.capacity
        worker.packages, worker.memory = ready.packages, ready.memory
        if self._launch is not None:
            worker.post(msgspec.structs.replace(self._launch, job=LAUNCH))
        else:
            self._serve(worker)

    def _serve(self, worker: Worker) -> None:
        self._happened(worker, WorkerEvent.READY_REPORTED)
        log.info("worker ready", extra={"worker": worker.id, "device": worker.device})
        if worker in self._restarting:
            self._restarting.remove(worker)
            self._restart_next()
        self._dispatch()

    def _restart_next(self) -> None:
        if self._restarting and not self.draining:
            worker = self._restarting[0]
            worker.failures = worker.failed_starts = 0
            self._happened(worker, WorkerEvent.RESTART_REQUESTED)

    def _models_changed(self, worker: Worker, residency: messages.Residency) -> None:
        before = {model.path: model for model in worker.models}
        after = {model.path: model for model in residency.models}
        worker.models, worker.memory = residency.models, residency.memory
        loaded = [model for path, model in after.items() if path not in before]
        unloaded = [model for path, model in before.items() if path not in after]
        for observer in self.observers if loaded or unloaded else ():
            observer.models_changed(worker, loaded, unloaded)

    # Jobs.

    def _admit(self, job: Job) -> None:
        if self.draining:
            raise Problem("draining", "cannot accept the job: the server is stopping",
                          retry_after=math.ceil(self.settings.drain_seconds) or 1)  # fmt: skip
        self._refuse_poison(job)
        if not self._can_serve(job):
            raise Problem("unavailable", "cannot accept the job: no worker is left",
                          retry_after=30)  # fmt: skip
        waiting, limit = len(self.queued), self.settings.max_queue
        if waiting >= limit:
            detail = f"cannot accept the job: the queue is full ({waiting} of {limit})"
            raise Problem("queue_full", detail, retry_after=self._seconds_until_a_place())
        self._refuse_if_too_late(job)

    def _refuse_poison(self, job: Job) -> None:
        if self._poison and fingerprint(job.message) in self._poison:
            detail = "cannot accept the job: the same request has ended two workers"
            raise Problem("poison", detail)

    def _can_serve(self, job: Job) -> bool:
        gone = (WorkerState.QUARANTINED, WorkerState.STOPPED)
        return any(
            worker.state not in gone
            for worker in self.workers.values()
            if job.pinned_worker in (None, worker.id)
        )

    def _refuse_if_too_late(self, job: Job) -> None:
        """Only on measured figures: a guess refuses nobody."""
        if not self.estimates.steps.knows(job.model) or not self.ready_workers():
            return
        expected = self._plan([*self._ordered(), job]).completion_seconds.get(job.id, 0.0)
        left = job.deadline - self._now()
        if expected > left:
            detail = f"cannot finish within {left:.0f} s: about {expected:.0f} s are needed"
            raise Problem("too_late", detail, field="timeout_seconds",
                          retry_after=math.ceil(expected - left))  # fmt: skip

    def _seconds_until_a_place(self) -> int:
        waits = self._plan(self._ordered()).completion_seconds.values()
        return max(math.ceil(min(waits, default=1.0)), 1)

    def _ordered(self) -> list[Job]:
        return in_order(self.queued.values(), self._running(), self._now())

    def _running(self) -> list[Job]:
        return [
            job for w in self.workers.values() for job in w.running.values() if not job.has_ended
        ]

    def _plan(self, jobs: list[Job]) -> placement.Plan:
        views = [worker.view(self.estimates) for worker in self.ready_workers()]
        return placement.plan([job.view(self.estimates) for job in jobs], views)

    def _dispatch(self) -> None:
        """Sends every job that can go, and tells the rest where they stand."""
        if not self.queued:
            return
        ordered = self._ordered()
        for id, worker_id in self._plan(ordered).dispatches:
            self._send(self.queued.pop(id), self.workers[worker_id])
        waiting = [job for job in ordered if job.id in self.queued]
        for position, job in enumerate(waiting, 1):
            if job.position != position:
                job.position = position
                job.tell(Queued(position))

    def _send(self, job: Job, worker: Worker) -> None:
        now = self._now()
        if not worker.running:
            worker.moved_at = now
        job.dispatched(worker.id, now)
        worker.running[job.id] = job
        worker.post(job.outgoing())
        for observer in self.observers:
            observer.job_dispatched(job, worker)

    def _job_moved(
        self, worker: Worker, message: messages.Progress | messages.Preview | messages.Picture
    ) -> None:
        job = worker.running.get(message.job)
        if job is None or job.has_ended:
            return
        match message:
            case messages.Picture():
                job.pictures[message.index] = message
            case messages.Preview():
                job.tell(Preview(message.data))
            case messages.Progress(phase="loading"):
                job.phase = message.phase
                share = message.step / message.steps if message.steps else 0.0
                job.tell(Loading(job.message.checkpoint.name, share))
            case messages.Progress():
                job.phase, job.step, job.steps = message.phase, message.step, message.steps
                job.tell(Progress(job.step, job.steps, job.step / max(job.steps, 1)))

    def _job_answered(
        self,
        worker: Worker,
        message: messages.Finished | messages.Rejected | messages.Failed | messages.Cancelled,
    ) -> None:
        if message.job == LAUNCH:
            return self._launched(worker, message)
        job = worker.running.pop(message.job, None)
        if isinstance(message, messages.Finished) and job is not None:
            self._measured(worker, job, message)
        if job is not None and not job.has_ended:
            self._end(job, *_outcome(job, message))
        self._dispatch()

    def _launched(self, worker: Worker, message: messages.FromWorker) -> None:
        if isinstance(message, messages.Finished):
            return self._serve(worker)
        detail = message.detail if isinstance(message, messages.Rejected | messages.Failed) else ""
        log.error("cannot load LAUNCH_CHECKPOINT", extra={"reason": detail})
        worker.fatal = messages.Fatal(reason="cannot load LAUNCH_CHECKPOINT", detail=detail)
        self._happened(worker, WorkerEvent.STALLED)

    def _measured(self, worker: Worker, job: Job, finished: messages.Finished) -> None:
        if finished.step_seconds is not None:
            worker.step_seconds = finished.step_seconds
            self.estimates.steps.measured(job.model, finished.step_seconds)
        if finished.load_seconds > 0:
            self.estimates.swaps.measured(job.model, finished.load_seconds)

    def _worker_lost(self, job: Job, ran_alone: bool, outside: bool, reason: str) -> None:
        if job.has_ended:
            return
        job.worker_lost(ran_alone)
        self.queued[job.id] = job
        match placement.after_death(job.deaths, job.deaths_alone, outside):
            case placement.Verdict.AGAIN:
                log.info("job runs again", extra={"job": job.id, "request_id": job.request_id})
            case placement.Verdict.POISON:
                self._poison[fingerprint(job.message)] = self._now() + POISON_SECONDS
                detail = f"cannot go on: the worker {reason} twice with nothing else running"
                self._end(job, JobEvent.FAILED, Outcome(problem=Problem("poison", detail)))
            case placement.Verdict.WORKER_LOST:
                problem = Problem("worker_lost", "cannot go on: the worker was lost again",
                                  retry_after=5)  # fmt: skip
                self._end(job, JobEvent.FAILED, Outcome(problem=problem))

    def _fail_if_nobody_is_left(self) -> None:
        for job in list(self.queued.values()):
            if not self._can_serve(job):
                problem = Problem("unavailable", "cannot go on: no worker is left", retry_after=30)
                self._end(job, JobEvent.FAILED, Outcome(problem=problem))

    def _end(self, job: Job, event: JobEvent, outcome: Outcome) -> None:
        """The one place where a job ends. A device still at it is told to stop."""
        self.queued.pop(job.id, None)
        worker = self.workers.get(-1 if job.worker is None else job.worker)
        if worker and job.id in worker.running:
            worker.post(messages.Cancel(job=job.id))
        job.ended(event, outcome)
        for observer in self.observers:
            observer.job_ended(job)


def _outcome(
    job: Job,
    message: messages.Finished | messages.Rejected | messages.Failed | messages.Cancelled,
) -> tuple[JobEvent, Outcome]:
    match message:
        case messages.Finished():
            pictures = [job.pictures[index] for index in sorted(job.pictures)]
            return JobEvent.FINISHED, Outcome(pictures=pictures, finished=message)
        case messages.Rejected():
            problem = Problem(message.code, message.detail, field=message.field)
        case messages.Failed():
            problem = Problem(message.code, message.detail)
        case messages.Cancelled():
            problem = Problem("cancelled", "cannot go on: the worker gave the job up")
        case _:
            assert_never(message)
    return JobEvent.FAILED, Outcome(problem=problem)


def fingerprint(message: messages.Generate | messages.Load | messages.Unload) -> bytes:
    """The same for requests that differ in nothing but their id and seeds."""
    same = msgspec.structs.replace(message, job="")
    if isinstance(same, messages.Generate):
        calls = [msgspec.structs.replace(call, seed=0, metadata={}) for call in same.calls]
        same = msgspec.structs.replace(same, calls=calls)
    return hashlib.blake2b(msgspec.msgpack.encode(same), digest_size=16).digest()
