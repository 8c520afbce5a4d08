"""Carries a request from its body to its answer: prepare, submit, wait, store, encode.

The fleet ends the job; what follows (files, webhooks, base64) happens here, in
threads, in a task of its own per job, so that it goes on when the caller leaves.
"""

import logging
import time
import uuid
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.abc
import msgspec
import pybase64
from anyio import to_thread

from ipc import messages
from supervisor.arrivals import Arrivals
from supervisor.errors import Problem
from supervisor.fleet import Fleet
from supervisor.jobs import Change, Ended, Job, Outcome
from supervisor.preparation import Preparation, unprepared
from supervisor.records import Record, Records
from supervisor.requests import GenerateBody
from supervisor.settings import Settings

log = logging.getLogger(__name__)

MAX_INLINE_BYTES = 4 * 2**20
"""Pictures that are encoded on the loop, in about half a millisecond (docs/adr/0008)."""


class Keeper(Protocol):
    """Stores pictures and tells webhooks, after a job and before its answer."""

    async def reserve(self, batch_id: str, store: bool) -> None:
        """Raises Problem when pictures of this batch id are stored already."""

    def release(self, batch_id: str) -> None:
        """The batch id is no longer this job's alone."""

    async def keep(self, record: Record, outcome: Outcome, meta: dict[str, Any]) -> list[str]:
        """The stored pictures' names; empty when none were to be stored."""


class Service:
    """What the routes call."""

    def __init__(
        self, settings: Settings, fleet: Fleet, preparation: Preparation, keeper: Keeper
    ) -> None:
        self.settings = settings
        self.fleet = fleet
        self.preparation = preparation
        self.records = Records(settings.job_retention_seconds)
        self._keeper = keeper
        self._tasks: anyio.abc.TaskGroup | None = None
        self._open = 0
        self._arrivals = Arrivals(fleet, preparation, self._accepted)
        self.preparing = self._arrivals.threads

    async def run(self) -> None:
        """Holds the tasks that finish jobs; runs until it is cancelled."""
        async with anyio.create_task_group() as self._tasks:
            await anyio.sleep_forever()

    @property
    def is_idle(self) -> bool:
        """True when every accepted request has its answer."""
        return self._open == 0

    async def accept(
        self,
        body: GenerateBody,
        caller: str,
        request_id: str,
        *,
        detached: bool = False,
        followed: bool = True,
    ) -> Record:
        """The request as a job: accepted, or waiting for a download. Raises Problem.

        `detached`: it runs on when its caller leaves; `followed`: its steps may be looked at.
        """
        if not body.return_images and not body.store_images:
            raise Problem("invalid_request", "cannot leave the pictures out of the answer unless "
                          "store_images is true", field="return_images")  # fmt: skip
        began = time.monotonic()
        id = uuid.uuid4().hex
        batch_id = body.batch_id or id
        await self._keeper.reserve(batch_id, body.store_images)
        limit = body.timeout_seconds or self.settings.request_timeout_seconds
        deadline, prepared = began + limit, unprepared(body, id)
        job = Job(id, prepared.message, began, deadline, request_id, caller, followed=followed)
        record = Record(job, body, prepared, batch_id, began, detached)
        assert self._tasks is not None
        try:
            await self._arrivals.settle(self._tasks, record)
        except BaseException:
            self._release(record)
            raise
        return record

    def _accepted(self, record: Record) -> None:
        self.records.add(record)
        self._open += 1
        assert self._tasks is not None
        self._tasks.start_soon(self._complete, record, record.job.request_id)
        log.info("job accepted", extra={"job": record.job.id, "request_id": record.job.request_id,
                                        "pipeline": record.prepared.message.pipeline})  # fmt: skip

    def stop(self) -> None:
        """Answers those whose jobs the fleet does not have yet."""
        self._arrivals.stop()

    async def carry_out(
        self,
        message: messages.Load | messages.Unload,
        request_id: str,
        worker: int | None = None,
    ) -> None:
        """Runs a load or an unload on a worker to its end. Raises Problem."""
        now = time.monotonic()
        deadline = now + self.settings.load_timeout_seconds
        job = Job(message.job, message, now, deadline, request_id, pinned_worker=worker)
        ended = watch_end(job)
        self.fleet.submit(job)
        try:
            await ended.wait()
        finally:
            self.fleet.cancel(job)
        assert job.outcome is not None
        if job.outcome.problem:
            raise job.outcome.problem

    def cancel(self, record: Record) -> None:
        self.fleet.cancel(record.job)

    async def _complete(self, record: Record, request_id: str) -> None:
        await watch_end(record.job).wait()
        now = time.monotonic
        try:
            record.end(now(), answer=await self._answer(record))
        except Problem as problem:
            record.end(now(), problem=problem)
        except Exception:
            log.exception("cannot answer", extra={"job": record.job.id})
            record.end(now(), problem=Problem("internal_error", "cannot answer: a defect here"))
        finally:
            self._open -= 1
            self._release(record)
            record.let_go()
            if not record.detached:
                self.records.drop(record.job.id)
        log.info("job ended", extra={"job": record.job.id, "request_id": request_id,
                                     "state": record.job.state.value})  # fmt: skip

    def _release(self, record: Record) -> None:
        """The batch id, where this request has reserved it: it may be another's."""
        if record.body.store_images:
            self._keeper.release(record.batch_id)

    async def _answer(self, record: Record) -> bytes:
        outcome = record.job.outcome
        assert outcome is not None
        if outcome.problem:
            raise outcome.problem
        meta = self._meta(record, outcome)
        try:
            names = await self._keeper.keep(record, outcome, meta)
        except Problem as problem:  # nowhere to store them: the caller gets what there is
            if record.body.return_images:
                problem.extra["images"] = await to_thread.run_sync(_base64, outcome)
            raise
        encode = partial(encode_answer, record, outcome, meta, names)
        small = sum(len(picture.data) for picture in outcome.pictures) <= MAX_INLINE_BYTES
        return encode() if small else await to_thread.run_sync(encode)

    def _meta(self, record: Record, outcome: Outcome) -> dict[str, Any]:
        job, finished = record.job, outcome.finished
        assert finished is not None
        assert job.worker is not None
        assert job.started_at is not None
        return {
            "model_load_time": round(finished.load_seconds, 4),
            "generation_time": round(finished.generation_seconds, 4),
            "image_encoding_time": round(finished.encode_seconds, 4),
            "b64_encoding_time": 0.0,
            "total_time": 0.0,
            "queue_time": round(job.started_at - job.accepted_at, 4),
            "seeds": record.prepared.seeds,
            "worker": job.worker,
            "device": self.fleet.workers[job.worker].device,
            "attempts": job.attempts,
            "nsfw": [picture.nsfw for picture in outcome.pictures],
            "memory_fallback": finished.memory_fallback,
        }


def watch_end(job: Job) -> anyio.Event:
    """An event that is set when the job has ended."""
    ended = anyio.Event()

    def watcher(change: Change) -> None:
        if isinstance(change, Ended):
            ended.set()

    job.watchers.append(watcher)
    if job.has_ended:
        ended.set()
    return ended


def _base64(outcome: Outcome) -> list[str]:
    return [pybase64.b64encode_as_string(picture.data) for picture in outcome.pictures]


def encode_answer(
    record: Record, outcome: Outcome, meta: dict[str, Any], names: list[str]
) -> bytes:
    """The answer's JSON, put together around the pictures' base64, which needs no escaping."""
    began, encode = time.monotonic(), msgspec.json.encode
    if record.body.return_images:
        texts = [pybase64.b64encode(picture.data) for picture in outcome.pictures]
        images = [b'["', b'","'.join(texts), b'"]']
    else:
        images = [encode(names)]
    now = time.monotonic()
    times = {
        "b64_encoding_time": round(now - began, 4),
        "total_time": round(now - record.accepted_at, 4),
    }
    head = encode({"batch_id": record.batch_id})
    rest = encode({"inputs": record.prepared.inputs, "meta": meta | times})
    return b"".join([head[:-1], b',"images":', *images, b",", rest[1:]])
