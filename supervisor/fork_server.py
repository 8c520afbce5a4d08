"""The fork server as the supervisor sees it: a process that forks workers in milliseconds.

It is started before the first worker and again, after a pause, whenever it ends. Who finds none
starts a worker as a program instead.
"""

import ctypes
import logging
import os
import socket
from collections.abc import Mapping, Sequence

import anyio

from ipc import forking
from supervisor.worker_process import Child, Ends, reap_strays, run_program, waited_for

log = logging.getLogger(__name__)
output_log = logging.getLogger("worker")

PR_SET_CHILD_SUBREAPER = 36
ANSWER_SECONDS = 20.0
PAUSE_SECONDS = 30.0


class ForkServer:
    """`fork` starts a worker while `is_ready`; `run` keeps the process alive."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], start_seconds: float
    ) -> None:
        self._command = command
        self._environ = environ
        self._start_seconds = start_seconds
        self._child: Child | None = None
        self._orders: socket.socket | None = None
        self._asking = anyio.Lock()
        self.is_starting = True

    @property
    def is_ready(self) -> bool:
        return self._orders is not None

    async def run(self) -> None:
        """Until it is cancelled."""
        # Forked workers lose their parent on purpose, and are this process's children from then on.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        while True:
            self.is_starting = True
            try:
                reason = await self._one_life()
            except OSError as error:
                reason = f"could not be started: {error.strerror or type(error).__name__}"
            self.is_starting = False
            log.warning("no fork server", extra={"reason": reason})
            await anyio.sleep(PAUSE_SECONDS)

    async def reap_strays(self) -> None:
        """Now and then; not while a worker is born whom nobody waits for yet."""
        while True:
            await anyio.sleep(PAUSE_SECONDS)
            async with self._asking:
                reap_strays()

    async def fork(self, environ: Mapping[str, str], ends: Ends) -> int:
        """A new worker's process id. Raises OSError."""
        order, descriptors = forking.encode_order(environ), [ends.reads, ends.writes, ends.output]
        async with self._asking:
            if self._orders is None:
                raise ConnectionError("there is no fork server")
            try:
                with anyio.fail_after(ANSWER_SECONDS):
                    socket.send_fds(self._orders, [order], descriptors)
                    pid = int(await _received(self._orders) or forking.NOBODY)
            except BaseException:
                self._give_up()  # its late answer would be taken for the next one's
                raise
            if pid == 0:
                raise ConnectionError("the fork server cannot fork")
            waited_for.add(pid)
        return pid

    def _give_up(self) -> None:
        self._orders = None
        if self._child is not None:
            self._child.kill()

    async def _one_life(self) -> str:
        """Why it ended. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            with theirs:
                self._child = child = self._started(theirs.fileno())
            try:
                return await self._until_exit(child, ours)
            finally:
                self._orders = self._child = None
                with anyio.CancelScope(shield=True):
                    await child.end()

    def _started(self, orders: int) -> Child:
        arguments = ("--fork-server", str(orders), "--parent", str(os.getpid()))
        reads, output = os.pipe()
        try:
            pid = run_program([*self._command, *arguments], self._environ, (orders,), output)
        except OSError:
            os.close(reads)
            raise
        finally:
            os.close(output)
        return Child(pid, reads)

    async def _until_exit(self, child: Child, orders: socket.socket) -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(self._print, child)
            group.start_soon(self._open, child, orders)
            exit = await child.wait()
            group.cancel_scope.cancel()
        return f"it {exit.in_words()}"

    async def _print(self, child: Child) -> None:
        async for line in child.lines():
            output_log.info(line)

    async def _open(self, child: Child, orders: socket.socket) -> None:
        """Once it can fork."""
        with anyio.move_on_after(self._start_seconds):
            if await _received(orders) == forking.READY:
                self.is_starting, self._orders = False, orders
                return log.info("fork server ready")
        child.kill()


async def _received(orders: socket.socket) -> bytes:
    """Empty when the other end is closed."""
    await anyio.wait_readable(orders)
    return orders.recv(forking.MAX_ANSWER_BYTES)
