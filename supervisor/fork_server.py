"""The fork server as the supervisor sees it: a process that forks workers in milliseconds.

It is started beside the first workers, which wait for it, and again, after a pause, whenever it
ends. Who finds none starts a worker as a program instead.
"""

import ctypes
import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence

import anyio

from ipc import forking
from supervisor.logs import pass_on
from supervisor.worker_process import Child, Ends, reap_strays, start_child, waited_for

log = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36
ANSWER_SECONDS = 5.0
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
        self.is_preparing = True
        """It is the first, and not known yet whether it can."""

    @property
    def is_ready(self) -> bool:
        return self._orders is not None

    async def run(self) -> None:
        """Until it is cancelled."""
        # Forked workers lose their parent on purpose, and are this process's children from then on.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it cannot wait for children
        while True:
            try:
                log.warning("no fork server", extra={"reason": await self._one_life()})
            except Exception:  # a defect must not take every worker with it
                log.exception("no fork server")
            self.is_preparing = False
            await anyio.sleep(PAUSE_SECONDS)

    async def reap_strays(self) -> None:
        """Now and then; not while a worker is born whom nobody waits for yet."""
        while True:
            await anyio.sleep(PAUSE_SECONDS)
            async with self._asking:
                reap_strays()

    async def fork(self, environ: Mapping[str, str], ends: Ends) -> int:
        """A new worker's process id. Raises OSError."""
        order = forking.encode_order(environ)
        async with self._asking:
            if self._orders is None:
                raise ConnectionError("there is no fork server")
            socket.send_fds(self._orders, [order], ends)
            try:
                with anyio.fail_after(ANSWER_SECONDS):
                    answer = await _received(self._orders)
            except BaseException:
                self._give_up()  # its late answer would be taken for the next one's
                raise
            if not answer.isdigit() or answer == forking.NOBODY:
                raise ConnectionError("the fork server cannot fork" if answer else "it has ended")
            waited_for.add(int(answer))
        return int(answer)

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
                orders = theirs.fileno()
                arguments = ("--fork-server", str(orders), "--parent", str(os.getpid()))
                child = start_child([*self._command, *arguments], self._environ, (orders,))
            self._child = child
            try:
                return await self._until_exit(child, ours)
            finally:
                self._orders = self._child = None
                with anyio.CancelScope(shield=True):
                    await child.end()

    async def _until_exit(self, child: Child, orders: socket.socket) -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(pass_on, child.lines())
            group.start_soon(self._open, child, orders)
            exit = await child.wait()
            group.cancel_scope.cancel()
        return f"it {exit.in_words()}"

    async def _open(self, child: Child, orders: socket.socket) -> None:
        """Once it can fork."""
        with anyio.move_on_after(self._start_seconds):
            if await _received(orders) == forking.READY:
                self.is_preparing, self._orders = False, orders
                return log.info("fork server ready")
        child.kill()


async def _received(orders: socket.socket) -> bytes:
    """Empty when the other end is closed."""
    await anyio.wait_readable(orders)
    return orders.recv(forking.MAX_ANSWER_BYTES)
