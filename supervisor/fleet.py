"""The workers of one host: turns events of their lives into state changes and actions.

One method per past-tense event; the decisions are in states, placement and worker. What
becomes of jobs is in work.py. The life of a process (spawning, pipes, reaping) is in
lives.py, which calls the event methods here. Everything runs on the event loop's thread.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import assert_never

import msgspec

from ipc import messages
from supervisor import placement
from supervisor.errors import Problem
from supervisor.jobs import Answered, Job, Outcome
from supervisor.observer import Observer, Observers
from supervisor.rotation import Rotation
from supervisor.settings import Settings
from supervisor.states import ImpossibleTransition, JobEvent, WorkerEvent, WorkerState
from supervisor.work import Work
from supervisor.worker import Cause, CauseKind, Process, Worker
from supervisor.worker_process import Exit

__all__ = ["Fleet", "Observer"]

log = logging.getLogger(__name__)

LAUNCH = "launch"
KILLED_FROM_OUTSIDE = (-9, -15)
"""Exit codes that a request cannot bring about; this side kills only with a cause."""


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
        self.observers = Observers()
        self.work = Work(settings, self.workers, self.observers, clock)
        self._launch = launch
        self._now = clock
        self._draw = draw
        self._rotation = Rotation()
        self._stopping = False

    # What others ask for.

    def submit(self, job: Job) -> None:
        """Accepts the job, or raises Problem. Its outcome comes with jobs.Ended."""
        self.work.submitted(job)

    def asked(self) -> None:
        """Before a job is prepared. Raises Problem where it would be refused whatever it is."""
        self.work.asked()

    def prepared(self, job: Job) -> None:
        """A job that callers were told of before it could run: it is not refused any more."""
        self.work.prepared(job)

    def cancel(self, job: Job) -> None:
        """Ends the job; its device stops within a step."""
        self.work.cancelled(job)

    def restart(self) -> None:
        """Replaces every worker, one after the other, each once its jobs are done."""
        self._restart_next(self._rotation.requested(self.workers))

    def drain(self) -> None:
        """Refuses new jobs from now on."""
        self.work.draining = True

    def stop(self) -> None:
        """Ends what is left: jobs are answered, workers told to exit."""
        self.work.draining = self._stopping = True
        problem = Problem("draining", "cannot go on: the server is stopping", retry_after=5)
        for job in self.work.unfinished():
            self.work.end(job, JobEvent.FAILED, Outcome(problem=problem))
        for worker in self.workers.values():
            self._happened(worker, WorkerEvent.STOP_REQUESTED)

    @property
    def draining(self) -> bool:
        return self.work.draining

    @property
    def queued(self) -> dict[str, Job]:
        return self.work.queued

    @property
    def is_idle(self) -> bool:
        return self.work.is_idle

    def ready_workers(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.state is WorkerState.READY]

    def planned(self) -> dict[str, int]:
        """Queued jobs and the worker that each would run on as things stand."""
        return self.work.planned()

    # Events of a worker's life.

    def worker_spawned(
        self, worker: Worker, process: Process, post: Callable[[messages.ToWorker], None]
    ) -> None:
        worker.began(process, post, self._now())
        if worker.state is not WorkerState.STARTING:  # told to stop while it was spawned
            process.kill()

    def spawn_failed(self, worker: Worker, reason: str) -> None:
        """There is no process; it counts as one that died at once."""
        cause = Cause(CauseKind.EXITED, f"could not be started: {reason}")
        self._ended(worker, worker.cause or cause)

    def worker_exited(self, worker: Worker, exit: Exit) -> None:
        """The process has been reaped: why it ended is known before or told by its exit."""
        cause, words = worker.cause, exit.in_words()
        if cause is None:
            kind = CauseKind.KILLED if exit.code in KILLED_FROM_OUTSIDE else CauseKind.EXITED
            cause = Cause(kind, words)
        elif cause.kind is not CauseKind.PLANNED:
            cause = Cause(cause.kind, f"{cause.words} ({words})")
        self._ended(worker, cause)

    def protocol_broken(self, worker: Worker, reason: str) -> None:
        self._doom(worker, WorkerEvent.PROTOCOL_BROKEN, Cause(CauseKind.PROTOCOL, reason))

    def received(self, worker: Worker, message: messages.FromWorker) -> None:
        """A message came from a worker; one out of turn ends it."""
        worker.moved_at = self._now()
        try:
            self._handle(worker, message)
        except ImpossibleTransition as error:
            self.protocol_broken(worker, f"spoke out of turn: {error}")

    def _handle(self, worker: Worker, message: messages.FromWorker) -> None:
        match message:
            case messages.Ready():
                self._reported_ready(worker, message)
            case messages.Residency():
                self._models_changed(worker, message)
            case messages.Worn():
                words = f"asked to be replaced ({message.reason}): {message.detail}"
                worker.wear = Cause(CauseKind.WORN, words)
                self._happened(worker, WorkerEvent.WORN_REPORTED)
            case messages.Fatal():
                cause = Cause(CauseKind.FATAL, f"gave up ({message.reason}): {message.detail}")
                self._doom(worker, WorkerEvent.FATAL_REPORTED, cause)
            case messages.Progress() | messages.Preview() | messages.Picture():
                self.work.moved(worker, message)
            case (
                messages.Finished() | messages.Rejected() | messages.Failed() | messages.Cancelled()
            ):
                if message.job == LAUNCH:
                    self._launched(worker, message)
                else:
                    self.work.answered(worker, message)
            case _:
                assert_never(message)

    def ticked(self) -> None:
        """Some time has passed: looks after every deadline."""
        self.work.time_passed()
        for worker in self.workers.values():
            self._look_after(worker, self._now())
        self.work.dispatch()

    # What follows from them.

    def _look_after(self, worker: Worker, now: float) -> None:
        stalled = worker.stalled(self.settings, self._launch is not None, now)
        if stalled is not None:
            self._doom(worker, WorkerEvent.STALLED, Cause(CauseKind.STALLED, stalled))
        elif worker.stop_is_overdue(now):
            self._happened(worker, WorkerEvent.STOP_TIMED_OUT)
            worker.state_since = now
        elif worker.term_is_due(now) and worker.process:
            worker.process.terminate()
        elif worker.state is WorkerState.DRAINING and not worker.running:
            worker.cause = worker.wear or Cause(CauseKind.PLANNED, "was replaced")
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

    def _doom(self, worker: Worker, event: WorkerEvent, cause: Cause) -> None:
        """The first cause is the one to tell."""
        worker.cause = worker.cause or cause
        self._happened(worker, event)

    def _happened(self, worker: Worker, event: WorkerEvent) -> None:
        before = worker.state
        worker.happened(event, self._now())
        if worker.state is WorkerState.KILLING and worker.process:
            worker.process.kill()
        if worker.state is WorkerState.STOPPING and before is not WorkerState.STOPPING:
            worker.cause = worker.cause or Cause(CauseKind.PLANNED, "was stopped")
            if event is not WorkerEvent.FATAL_REPORTED:  # then it exits by itself
                worker.post(messages.Shutdown())

    def _ended(self, worker: Worker, cause: Cause) -> None:
        jobs = worker.gone()
        self._happened(worker, WorkerEvent.EXITED)
        if cause.kind is not CauseKind.PLANNED:
            worker.died(cause.words)
            log.warning("worker exited", extra={"worker": worker.id, "reason": cause.words})
        delay_seconds = placement.restart_delay_seconds(worker.failures, self._draw())
        worker.restart_at = self._now() + delay_seconds
        for job in jobs:
            from_outside = cause.kind is CauseKind.KILLED
            self.work.worker_lost(job, len(jobs) == 1, from_outside, cause.words)
        self.observers.tell(lambda observer: observer.worker_exited(worker, cause))
        if self._stopping:
            self._happened(worker, WorkerEvent.STOP_REQUESTED)
        elif placement.is_hopeless(worker.failed_starts):
            self._give_up(worker)
        self.work.dispatch()

    def _give_up(self, worker: Worker) -> None:
        self._happened(worker, WorkerEvent.GAVE_UP)
        log.error("worker quarantined", extra={"worker": worker.id, "reason": worker.last_exit})
        self.work.workers_dwindled()
        self._restart_next(self._rotation.came_back(worker.id))

    def _reported_ready(self, worker: Worker, ready: messages.Ready) -> None:
        if ready.protocol != messages.PROTOCOL_VERSION:
            return self.protocol_broken(worker, f"speaks protocol {ready.protocol}")
        worker.name, worker.capacity = ready.device_name, ready.capacity
        worker.packages, worker.memory = ready.packages, ready.memory
        if self._launch is not None:
            worker.post(msgspec.structs.replace(self._launch, job=LAUNCH))
        else:
            self._serve(worker)

    def _launched(self, worker: Worker, message: Answered) -> None:
        """LAUNCH_CHECKPOINT is loaded, or cannot be: then the worker is of no use."""
        if isinstance(message, messages.Finished):
            return self._serve(worker)
        detail = message.detail if not isinstance(message, messages.Cancelled) else "cancelled"
        cause = Cause(CauseKind.LAUNCH, f"could not load LAUNCH_CHECKPOINT: {detail}")
        self._doom(worker, WorkerEvent.STALLED, cause)

    def _serve(self, worker: Worker) -> None:
        self._happened(worker, WorkerEvent.READY_REPORTED)
        if worker.state is WorkerState.READY:  # it may have been told to stop meanwhile
            log.info("worker ready", extra={"worker": worker.id, "device": worker.device})
            self._restart_next(self._rotation.came_back(worker.id))
            self.work.dispatch()

    def _restart_next(self, id: int | None) -> None:
        if id is not None and not self.draining:
            worker = self.workers[id]
            worker.failures, worker.failed_starts, worker.restart_at = 0, 0, self._now()
            self._happened(worker, WorkerEvent.RESTART_REQUESTED)

    def _models_changed(self, worker: Worker, residency: messages.Residency) -> None:
        before = {model.path: model for model in worker.models}
        after = {model.path: model for model in residency.models}
        worker.told(residency, self._now())
        loaded = [model for path, model in after.items() if path not in before]
        unloaded = [model for path, model in before.items() if path not in after]
        if loaded or unloaded:
            self.observers.tell(lambda observer: observer.models_changed(worker, loaded, unloaded))
