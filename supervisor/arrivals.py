"""Requests on their way to becoming jobs: prepared, in threads if need be, and handed to the fleet.

One whose models must be downloaded first is a job before it is prepared: queued, and its
watchers are told how far the download is. What is refused before that never was one.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import anyio
import anyio.abc
from anyio import to_thread
from anyio.streams.memory import MemoryObjectReceiveStream

from supervisor import downloads
from supervisor.errors import Problem
from supervisor.fleet import Fleet
from supervisor.jobs import Loading, Outcome
from supervisor.preparation import Preparation
from supervisor.records import Record
from supervisor.states import JobEvent

log = logging.getLogger(__name__)

PREPARING_THREADS = 32
"""Threads of their own: one that waits for a download must not hold up an encoder."""


@dataclass(slots=True, eq=False)
class Arrival:
    """A request that is being prepared. `settled`: it is a job by now, or was refused."""

    record: Record
    settled: anyio.Event = field(default_factory=anyio.Event)
    refusal: Exception | None = None


class Arrivals:
    """`accepted` is called with each request that has become a job."""

    def __init__(
        self, fleet: Fleet, preparation: Preparation, accepted: Callable[[Record], None]
    ) -> None:
        self.threads = anyio.CapacityLimiter(PREPARING_THREADS)
        self._fleet = fleet
        self._preparation = preparation
        self._accepted = accepted
        self._under_way: set[Arrival] = set()

    async def settle(self, tasks: anyio.abc.TaskGroup, record: Record) -> None:
        """Returns once the request is a job; one of `tasks` goes on where it has to wait for a
        download. Raises Problem when it is refused."""
        self._fleet.asked()
        prepared = self._preparation.at_once(record.body, record.job.id)
        if prepared is not None:
            record.take(prepared)
            self._fleet.submit(record.job)
            return self._accepted(record)
        arrival = Arrival(record)
        tasks.start_soon(self._arrive, tasks, arrival)
        try:
            await arrival.settled.wait()
        except BaseException:
            self._fleet.cancel(record.job)  # nobody waits for it any more
            raise
        if arrival.refusal is not None:
            raise arrival.refusal

    def stop(self) -> None:
        """Those that still wait for downloads are answered."""
        problem = Problem("draining", "cannot go on: the server is stopping", retry_after=5)
        for arrival in tuple(self._under_way):
            self._turn_away(arrival, JobEvent.FAILED, problem)

    async def _arrive(self, tasks: anyio.abc.TaskGroup, arrival: Arrival) -> None:
        record, event = arrival.record, JobEvent.FAILED
        self._under_way.add(arrival)
        try:
            with anyio.move_on_after(record.job.deadline - record.accepted_at) as limit:
                await self._prepare(tasks, arrival)
            if limit.cancelled_caught:
                event = JobEvent.EXPIRED
                raise Problem("deadline_exceeded", "cannot have the models downloaded within the "
                              "job's time limit", field="timeout_seconds")  # fmt: skip
            if arrival.settled.is_set() and not record.job.has_ended:
                self._fleet.prepared(record.job)
            elif not record.job.has_ended:
                self._fleet.submit(record.job)
                self._adopt(arrival)
        except Exception as error:
            self._turn_away(arrival, event, error)
        finally:
            self._under_way.discard(arrival)
            arrival.settled.set()

    async def _prepare(self, tasks: anyio.abc.TaskGroup, arrival: Arrival) -> None:
        loop, record = asyncio.get_running_loop(), arrival.record
        send, receive = anyio.create_memory_object_stream[Loading](math.inf)
        tasks.start_soon(self._follow, arrival, receive)

        def put(change: Loading) -> None:
            with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                send.send_nowait(change)

        def told(model: str, fraction: float) -> None:
            with suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(put, Loading(model, fraction))

        downloads.listener.set(told)
        prepare = partial(self._preparation.prepare, record.body, record.job.id)
        with send:
            prepared = await to_thread.run_sync(
                prepare, limiter=self.threads, abandon_on_cancel=True
            )
        if not record.job.has_ended:
            record.take(prepared)

    async def _follow(
        self, arrival: Arrival, downloading: MemoryObjectReceiveStream[Loading]
    ) -> None:
        with downloading:
            async for change in downloading:
                self._adopt(arrival)
                arrival.record.job.tell(change)

    def _adopt(self, arrival: Arrival) -> None:
        """The request is a job from now on."""
        if not (arrival.settled.is_set() or arrival.record.job.has_ended):
            self._accepted(arrival.record)
            arrival.settled.set()

    def _turn_away(self, arrival: Arrival, event: JobEvent, error: Exception) -> None:
        """A request's caller is told; a job ends."""
        job = arrival.record.job
        if not arrival.settled.is_set():
            arrival.refusal = error
            arrival.settled.set()
        elif not job.has_ended:
            if not isinstance(error, Problem):
                log.error("cannot prepare", exc_info=error, extra={"job": job.id})
                error = Problem("internal_error", "cannot prepare the request: a defect here")
            self._fleet.work.end(job, event, Outcome(problem=error))
