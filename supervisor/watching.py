"""Watching a job: its changes as a stream of events, and leaving when the caller does."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from starlette.types import Receive

from supervisor.jobs import Change, Ended, Job, Progress, Queued
from supervisor.records import Record
from supervisor.states import JobState

MAX_UNREAD = 256
"""A watcher that reads more slowly than this misses steps in between, never the end."""


@contextmanager
def watching(job: Job) -> Iterator[MemoryObjectReceiveStream[Change]]:
    """The job's changes from now on; the last one is Ended."""
    send, receive = anyio.create_memory_object_stream[Change](MAX_UNREAD)

    def watcher(change: Change) -> None:
        if isinstance(change, Ended):
            send.close()
            return
        with suppress(anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
            send.send_nowait(change)

    job.watchers.append(watcher)
    if job.has_ended:
        send.close()
    try:
        yield receive
    finally:
        job.watchers.remove(watcher)
        send.close()
        receive.close()


async def changes(record: Record) -> AsyncGenerator[Change, None]:
    """Where the job is, then each change until it has ended and its answer is there."""
    job = record.job
    with watching(job) as stream:
        if job.state is JobState.QUEUED:
            yield Queued(job.position)
        elif job.state is JobState.RUNNING and job.steps:
            yield Progress(job.step, job.steps, job.step / job.steps)
        async for change in stream:
            yield change
    await record.done.wait()


async def done_or_gone(record: Record, receive: Receive) -> bool:
    """Waits for the answer; false when the caller hung up before it was there."""
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as listening:
        # By the loop: a task that cancels is described in words, which takes anyio longer than all
        # else here.
        record.when_done(lambda: loop.call_soon(listening.cancel))
        while (await receive())["type"] != "http.disconnect":
            pass
    return record.done.is_set()
