"""The jobs of a fleet: admitted, queued, sent to workers, taken back from dead ones, ended.

One method per past-tense event of a job's life; the decisions are in admission, jobs,
placement and suspects. Knows workers as what jobs run on, and nothing of their processes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, assert_never

from ipc import messages
from supervisor import admission, placement
from supervisor.errors import Problem
from supervisor.estimates import Estimates
from supervisor.jobs import (
    UNFOLLOWED_SECONDS,
    Answered,
    Job,
    Moved,
    Outcome,
    Queued,
    in_order,
    overdue,
)
from supervisor.observer import Observers
from supervisor.settings import Settings
from supervisor.states import JobEvent, WorkerState
from supervisor.suspects import Suspects
from supervisor.worker import Worker

log = logging.getLogger(__name__)

LOST_FOR_GOOD = (WorkerState.QUARANTINED, WorkerState.STOPPED)


class Work:
    """Accepts a job once and ends it once, whatever becomes of the workers in between."""

    def __init__(
        self,
        settings: Settings,
        workers: Mapping[int, Worker],
        observers: Observers,
        clock: Callable[[], float],
    ) -> None:
        self.queued: dict[str, Job] = {}
        self.estimates = Estimates()
        self.draining = False
        self._settings = settings
        self._workers = workers
        self._observers = observers
        self._now = clock
        self._suspects = Suspects()
        self._served_at: dict[str, float] = {}

    @property
    def is_idle(self) -> bool:
        return not self.queued and not any(worker.running for worker in self._workers.values())

    def unfinished(self) -> list[Job]:
        return [*self.queued.values(), *self._running()]

    # What becomes of a job.

    def submitted(self, job: Job) -> None:
        """Accepts the job, or raises Problem. Its outcome comes with jobs.Ended."""
        views = () if self._is_full else self._views()  # a full queue refuses without a look
        problem = admission.refusal(self._situation(job, views))
        if problem is not None:
            self._refuse(problem)
        self.prepared(job, views)

    def asked(self) -> None:
        """Somebody wants a job that is not prepared yet. Raises Problem while draining."""
        if self.draining:
            self._refuse(admission.draining(self._settings.drain_seconds))

    def prepared(self, job: Job, views: Sequence[placement.WorkerView] = ()) -> None:
        """A job that was accepted, at once or before its models were downloaded, can run."""
        self.queued[job.id] = job
        self.dispatch(views)

    def cancelled(self, job: Job) -> None:
        if not job.has_ended:
            problem = Problem("cancelled", "cannot go on: the job was cancelled")
            self.end(job, JobEvent.CANCELLED, Outcome(problem=problem))
            self.dispatch()

    def time_passed(self) -> None:
        callers = {job.caller for job in self.queued.values()}
        self._served_at = {who: at for who, at in self._served_at.items() if who in callers}
        for job in overdue(self.unfinished(), self._now()):
            detail = "cannot finish the job within its time limit"
            problem = Problem("deadline_exceeded", detail, field="timeout_seconds")
            self.end(job, JobEvent.EXPIRED, Outcome(problem=problem))

    def moved(self, worker: Worker, message: Moved) -> None:
        """A worker is getting on with a job."""
        job = worker.running.get(message.job)
        if job is not None:
            job.moved(message, self._now())

    def answered(self, worker: Worker, message: Answered) -> None:
        """A worker is done with a job."""
        job = worker.running.pop(message.job, None)
        if job is not None:
            if isinstance(message, messages.Finished):
                self._measured(worker, job, message)
            if not job.has_ended:
                self.end(job, *job.outcome_of(message))
        self.dispatch()

    def worker_lost(self, job: Job, alone: bool, from_outside: bool, reason: str) -> None:
        """A job's worker died: the job runs again by itself, or has been given up."""
        now = self._now()
        suspect = alone and not from_outside
        suspicions = self._suspects.died_with(job.message, now) if suspect else 0
        if job.has_ended:
            return
        job.worker_lost(from_outside)
        self.queued[job.id] = job
        verdict = placement.after_death(job.deaths, job.killed_from_outside, suspicions)
        match verdict:
            case placement.Verdict.AGAIN:
                log.info("job runs again", extra={"job": job.id, "request_id": job.request_id})
                return
            case placement.Verdict.POISON:
                detail = f"cannot go on: twice a worker that ran nothing else {reason}"
                problem = Problem("poison", detail)
            case placement.Verdict.WORKER_LOST:
                detail = f"cannot go on: the worker was lost again: it {reason}"
                problem = Problem("worker_lost", detail, retry_after=5)
            case _:
                assert_never(verdict)
        self.end(job, JobEvent.FAILED, Outcome(problem=problem))

    def workers_dwindled(self) -> None:
        """A worker will not come back: jobs that nobody is left for are answered."""
        for job in list(self.queued.values()):
            if not self._has_worker(job):
                problem = Problem("unavailable", "cannot go on: no worker is left", retry_after=30)
                self.end(job, JobEvent.FAILED, Outcome(problem=problem))

    def end(self, job: Job, event: JobEvent, outcome: Outcome) -> None:
        """The one place where a job ends. A device still at it is told to stop."""
        self.queued.pop(job.id, None)
        worker = None if job.worker is None else self._workers[job.worker]
        if worker is not None and job.id in worker.running:
            worker.post(messages.Cancel(job=job.id))
        job.ended(event, outcome)
        self._observers.tell(lambda observer: observer.job_ended(job))

    # Where jobs go.

    def planned(self) -> dict[str, int]:
        """Queued jobs and the worker that each would run on as things stand."""
        return {placed.job: placed.worker for placed in self._plan(self._ordered())}

    def dispatch(self, views: Sequence[placement.WorkerView] = ()) -> None:
        """Sends every job that can go, and tells the rest where they stand.

        `views` are those of the ready workers, where they are known already.
        """
        if not self.queued:
            return
        ordered = self._ordered()
        if any(len(worker.running) < worker.capacity for worker in self._ready()):
            jobs = [job.view(self.estimates) for job in ordered]
            for id, worker_id in placement.dispatches(jobs, views or self._views()):
                self._send(self.queued.pop(id), self._workers[worker_id])
        waiting = [job for job in ordered if job.id in self.queued]
        for position, job in enumerate(waiting, 1):
            if job.position != position:
                job.position = position
                job.tell(Queued(position))

    def _send(self, job: Job, worker: Worker) -> None:
        now = self._now()
        if not worker.running:
            worker.moved_at = now
        self._served_at[job.caller] = now
        job.dispatched(worker.id, now, swaps=job.model not in worker.resident)
        worker.running[job.id] = job
        # Well within the time after which a worker that is quiet counts as hanging.
        longest = self._settings.step_timeout_seconds / 4
        worker.post(job.outgoing(min(UNFOLLOWED_SECONDS, longest)))
        self._observers.tell(lambda observer: observer.job_dispatched(job, worker))

    def _views(self) -> list[placement.WorkerView]:
        now = self._now()
        return [worker.view(self.estimates, now) for worker in self._ready()]

    def _ready(self) -> list[Worker]:
        return [w for w in self._workers.values() if w.state is WorkerState.READY]

    def _plan(self, jobs: list[Job]) -> list[placement.Placed]:
        return placement.plan([job.view(self.estimates) for job in jobs], self._views())

    def _ordered(self) -> list[Job]:
        return in_order(self.queued.values(), self._running(), self._served_at, self._now())

    def _running(self) -> list[Job]:
        workers = self._workers.values()
        return [job for w in workers for job in w.running.values() if not job.has_ended]

    # What admission looks at.

    def _refuse(self, problem: Problem) -> NoReturn:
        self._observers.tell(lambda observer: observer.job_refused(problem.code))
        raise problem

    def _situation(self, job: Job, views: Sequence[placement.WorkerView]) -> admission.Situation:
        settings, full = self._settings, self._is_full
        return admission.Situation(
            draining=self.draining,
            drain_seconds=settings.drain_seconds,
            is_poison=self._suspects.are_poison(job.message, self._now()),
            has_worker=self._has_worker(job),
            queued=len(self.queued),
            max_queue=settings.max_queue,
            place_seconds=self._place_seconds() if full else 1.0,
            expected_seconds=None if full else self._expected_seconds(job, views),
            left_seconds=job.deadline - self._now(),
        )

    @property
    def _is_full(self) -> bool:
        return len(self.queued) >= self._settings.max_queue

    def _has_worker(self, job: Job) -> bool:
        workers = self._workers.values()
        able = [worker for worker in workers if job.pinned_worker in (None, worker.id)]
        return any(worker.state not in LOST_FOR_GOOD for worker in able)

    def _place_seconds(self) -> float:
        plan = self._plan(self._ordered())
        return min((placed.completion_seconds for placed in plan), default=1.0)

    def _expected_seconds(self, job: Job, views: Sequence[placement.WorkerView]) -> float | None:
        """Only from measured steps: a guess refuses nobody. Spares itself the plan when
        all that waits, one after the other, would be done in time."""
        if not views or not self.estimates.steps.knows(job.kind):
            return None
        jobs = [other.view(self.estimates) for other in [*self.queued.values(), job]]
        ahead = max(sum(view.running_seconds) for view in views)
        most = ahead + sum(other.work_seconds + other.swap_seconds for other in jobs)
        if most <= job.deadline - self._now():
            return most
        plan = self._plan([*self._ordered(), job])
        return next((p.completion_seconds for p in plan if p.job == job.id), None)

    def _measured(self, worker: Worker, job: Job, finished: messages.Finished) -> None:
        worker.failures = 0
        if finished.step_seconds is not None:
            worker.step_seconds = finished.step_seconds
            self.estimates.stepped(job.kind, finished.step_seconds, finished.batch_rows)
        if job.swaps and finished.load_seconds > 0:
            self.estimates.swaps.measured(job.model, finished.load_seconds)
        self._suspects.succeeded(job.message)
        self._observers.tell(lambda observer: observer.job_answered(job, worker, finished))
