"""The lives of a fleet's worker processes: spawn, feed, listen, reap, and again.

Knows when things happen and tells the fleet; decides nothing itself.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.abc
from anyio import to_thread

from ipc import messages
from ipc.channel import Codec, PeerGone, ProtocolError
from supervisor import monitoring
from supervisor.conversation import Conversation
from supervisor.fleet import Fleet
from supervisor.fork_server import ForkServer
from supervisor.logs import pass_on
from supervisor.states import LIVE_WORKER_STATES, WorkerState
from supervisor.worker import Worker
from supervisor.worker_process import COMMAND, Exit, WorkerProcess, start_program

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""A deadline is noticed at most so late."""
POLL_SECONDS = 0.2
FRAME_SECONDS = 30.0
"""A frame that has begun must be whole within this time."""
LAST_WORDS_SECONDS = 1.0
MEMORY_SECONDS = 20.0
"""How long a device may take to give back what a dead worker held there."""
SECRET_VARIABLES = frozenset({"API_KEY", "HF_TOKEN", "WEBHOOK_SECRET", "WEBHOOK_AUTH_VALUE"})

Begin = Callable[[Worker], messages.Start]


class Lives:
    """Keeps one process per worker of the fleet alive until the worker is stopped."""

    def __init__(
        self,
        fleet: Fleet,
        begin: Begin,
        command: Sequence[str] = COMMAND,
        environ: Mapping[str, str] = os.environ,
        forks: bool = False,
    ) -> None:
        """`forks`: the command knows `--fork-server`."""
        self._fleet = fleet
        self._begin = begin
        self._command = command
        self._environ = environ
        self._baselines: dict[int, int | None] = {}
        sharers = sum(worker.device == "cpu" for worker in fleet.workers.values())
        self._threads = max(len(os.sched_getaffinity(0)) // max(sharers, 1), 1)
        limit = fleet.settings.start_timeout_seconds
        shared = environment_of_all(environ)
        self._fork_server = ForkServer(command, shared, limit) if forks else None
        self._codec: Codec[messages.ToWorker, messages.FromWorker] = Codec(messages.FromWorker)

    async def run(self) -> None:
        """Returns when every worker is stopped."""
        self._look_later()
        try:
            async with anyio.create_task_group() as group:
                if self._fork_server is not None:
                    group.start_soon(self._fork_server.run)
                    group.start_soon(self._fork_server.reap_strays)
                async with anyio.create_task_group() as workers:
                    for worker in self._fleet.workers.values():
                        workers.start_soon(self._live, worker)
                group.cancel_scope.cancel()
        finally:
            self._next_look.cancel()

    def _look_later(self) -> None:
        """In LOOK_SECONDS, or with a message that comes in their second half: to be woken up costs
        more than to look."""
        later = asyncio.get_running_loop().call_later
        self._next_look = later(LOOK_SECONDS, self._look_after_workers)

    def _look_after_workers(self) -> None:
        self._next_look.cancel()
        self._look_later()
        try:
            self._fleet.ticked()
        except Exception:  # a defect must not take every worker with it
            log.exception("cannot look after the workers")

    def _received(self, worker: Worker, message: messages.FromWorker) -> None:
        self._fleet.received(worker, message)
        if self._next_look.when() - anyio.current_time() < LOOK_SECONDS / 2:
            self._look_after_workers()

    async def _live(self, worker: Worker) -> None:
        while worker.state is not WorkerState.STOPPED:
            if worker.state in LIVE_WORKER_STATES:
                await self._one_life(worker)
            else:  # between two lives, which are to be no further apart than they must
                await anyio.sleep(POLL_SECONDS)
                if worker.state is WorkerState.BACKING_OFF:
                    self._look_after_workers()

    async def _one_life(self, worker: Worker) -> None:
        environ = environment(worker.device, self._environ, self._threads)
        if worker.device != "cpu":
            await self._memory_is_back(worker, environ["CUDA_VISIBLE_DEVICES"])
        while self._is_preparing and worker.state is WorkerState.STARTING:  # noqa: ASYNC110 - two owners
            await anyio.sleep(POLL_SECONDS)
        if worker.state is not WorkerState.STARTING:  # told to stop before there was a process
            return self._fleet.spawn_failed(worker, "it was told to stop")
        try:
            process = await self._spawned(worker, environ)
        except OSError as error:
            return self._fleet.spawn_failed(worker, error.strerror or type(error).__name__)
        try:
            exit = await self._until_exit(worker, process)
        finally:
            with anyio.CancelScope(shield=True):
                await process.end()
        self._fleet.worker_exited(worker, exit)

    @property
    def _is_preparing(self) -> bool:
        return self._fork_server is not None and self._fork_server.is_preparing

    async def _spawned(self, worker: Worker, environ: Mapping[str, str]) -> WorkerProcess:
        """By the fork server where there is one; not after a start that failed, since what was
        imported may be to blame. Raises OSError."""
        forks = self._fork_server
        if forks is not None and forks.is_ready and not worker.failed_starts:
            try:
                return await WorkerProcess.spawn(environ, self._codec, forks.fork)
            except OSError as error:
                reason = str(error) or type(error).__name__
                log.warning("cannot fork", extra={"worker": worker.id, "reason": reason})
        start = partial(start_program, self._command)
        return await WorkerProcess.spawn(environ, self._codec, start)

    async def _until_exit(self, worker: Worker, process: WorkerProcess) -> Exit:
        received = partial(self._received, worker)
        with Conversation(process.channel, received, FRAME_SECONDS) as conversation:
            self._fleet.worker_spawned(worker, process, partial(self._say, worker, conversation))
            conversation.say(self._begin(worker))
            async with anyio.create_task_group() as group:
                heard, printed = anyio.Event(), anyio.Event()
                group.start_soon(self._print, worker, process, printed)
                group.start_soon(self._hear, worker, conversation, heard)
                exit = await process.wait()
                # What it said before it ended is still in the pipes.
                with anyio.move_on_after(LAST_WORDS_SECONDS):
                    await heard.wait()
                    await printed.wait()
                group.cancel_scope.cancel()
        return exit

    async def _memory_is_back(self, worker: Worker, device: str) -> None:
        """Waits, for a while, until the device's memory is as before the first worker."""

        async def used() -> int | None:
            return await to_thread.run_sync(monitoring.used_device_bytes, device)

        if worker.id not in self._baselines:
            self._baselines[worker.id] = await used()
        with anyio.move_on_after(MEMORY_SECONDS) as waiting:
            while worker.state is WorkerState.STARTING and monitoring.is_still_held(  # noqa: ASYNC110
                await used(), self._baselines[worker.id]
            ):
                await anyio.sleep(POLL_SECONDS)
        if waiting.cancelled_caught:
            log.warning("device memory is still held", extra={"worker": worker.id})

    async def _print(self, worker: Worker, process: WorkerProcess, printed: anyio.Event) -> None:
        await pass_on(process.lines(), worker=worker.id)
        printed.set()

    def _say(self, worker: Worker, conversation: Conversation, message: Any) -> None:
        try:
            conversation.say(message)
        except ProtocolError as error:
            answer = messages.Failed(job=message.job, code="invalid_request", detail=str(error))
            # Not at once: whoever sends jobs is in the midst of it.
            asyncio.get_running_loop().call_soon(self._fleet.received, worker, answer)

    async def _hear(self, worker: Worker, conversation: Conversation, heard: anyio.Event) -> None:
        """Until the worker's end is closed or it talks nonsense."""
        try:
            await conversation.ended()
        except PeerGone:
            heard.set()
            reason = "closed its pipe and lived on"
            await anyio.sleep(LAST_WORDS_SECONDS)  # an exit is the better explanation
        except ProtocolError as error:
            reason = f"broke the protocol: {error}"
            log.warning("broken frame", extra={"worker": worker.id, "reason": str(error)})
        except Exception:  # a defect here must not take every worker with it
            reason = "was given up after a defect in the supervisor"
            log.exception("cannot handle a message", extra={"worker": worker.id})
        heard.set()
        self._fleet.protocol_broken(worker, reason)


def environment_of_all(environ: Mapping[str, str]) -> dict[str, str]:
    """What all workers see: no secret, and never the network."""
    return {
        **{name: value for name, value in environ.items() if name not in SECRET_VARIABLES},
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def environment(device: str, environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """A worker's environment: it sees one device.

    `threads` is a worker's share of the host's processors when it computes on them.
    """
    index = device.partition(":")[2]
    visible = [word.strip() for word in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    listed = bool(index) and visible != [""] and int(index) < len(visible)
    return {
        **({"OMP_NUM_THREADS": str(threads)} if device == "cpu" else {}),
        **environment_of_all(environ),
        "CUDA_VISIBLE_DEVICES": visible[int(index)] if listed else index,
    }
