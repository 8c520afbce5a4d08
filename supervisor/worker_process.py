"""Starts, signals and reaps ONE child process; the only user of subprocesses.

The child leads a session of its own, so that a signal to its group reaches
whatever it started. What it prints is drained line by line into the log.
"""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import anyio
import msgspec

from ipc.channel import Codec, NonBlockingChannel
from ipc.messages import FromWorker, ToWorker

COMMAND = (sys.executable, "-m", "gpu_worker")
MAX_LINE_BYTES = 4000
READ_BYTES = 2**16
PIPE_BYTES = 2**20
REAP_SECONDS = 5.0
REAP_POLL_SECONDS = 0.01


class Exit(msgspec.Struct, frozen=True):
    """How a process ended: `code` is negative for a signal, as in the standard library."""

    code: int

    def in_words(self) -> str:
        if self.code >= 0:
            return f"exited with code {self.code}"
        try:
            return f"was ended by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was ended by signal {-self.code}"


UNKNOWN = Exit(255)
"""Somebody else has reaped the process."""


class Ends(NamedTuple):
    """The descriptors of a worker: what it reads and writes messages on, and its output."""

    reads: int
    writes: int
    output: int


Start = Callable[[Mapping[str, str], Ends], Awaitable[int]]
"""Begins a worker with an environment and returns its process's id. Raises OSError."""


waited_for: set[int] = set()
"""Children that somebody reaps."""


class Child:
    """A child that lives; `output` is where what it prints can be read."""

    def __init__(self, pid: int, output: int) -> None:
        waited_for.add(pid)
        os.set_blocking(output, False)
        self.pid = pid
        self._output = output
        self._exit: Exit | None = None
        self._group_ended = False

    async def lines(self) -> AsyncIterator[str]:
        """What the child prints, until it closes its output."""
        rest = b""
        while chunk := await self._read():
            *whole, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                whole, rest = [*whole, rest], b""
            for line in whole:
                yield _text(line)
        if rest:
            yield _text(rest)

    async def _read(self) -> bytes:
        while True:
            await anyio.wait_readable(self._output)
            with suppress(BlockingIOError):
                return os.read(self._output, READ_BYTES)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def wait(self) -> Exit:
        """Reaps the process when it has ended, and ends what is left of its group."""
        if self._exit is not None:
            return self._exit
        with suppress(OSError):  # no such descriptors here, or reaped already
            descriptor = os.pidfd_open(self.pid)
            try:
                await anyio.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        while self._exit is None:
            try:
                self._exit = _reaped(self.pid)
            except ChildProcessError:
                self._exit = UNKNOWN
            if self._exit is None:
                await anyio.sleep(REAP_POLL_SECONDS)
        self.kill()
        self._group_ended = True  # from now on the number may be somebody else's
        return self._exit

    async def end(self) -> None:
        """Kills what still lives, reaps it and closes every descriptor."""
        self.kill()
        with anyio.move_on_after(REAP_SECONDS):
            await self.wait()
            await self._reap_group()
        waited_for.discard(self.pid)
        os.close(self._output)

    async def _reap_group(self) -> None:
        """What the child had started has become ours where we are a subreaper, or process 1 of a
        container."""
        with suppress(ChildProcessError):
            while True:
                if _reaped(-self.pid) is None:
                    await anyio.sleep(REAP_POLL_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        if self._group_ended:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class WorkerProcess(Child):
    """A worker's process and its channel."""

    def __init__(
        self, pid: int, output: int, channel: NonBlockingChannel[ToWorker, FromWorker]
    ) -> None:
        super().__init__(pid, output)
        self.channel = channel

    @classmethod
    async def spawn(
        cls, environ: Mapping[str, str], codec: Codec[ToWorker, FromWorker], start: Start
    ) -> "WorkerProcess":
        """Called on the main thread: a program's parent-death signal follows the thread that
        started it. Raises OSError."""
        child_reads, we_write, we_read, child_writes, we_hear, child_prints = _pipes(3)
        with suppress(OSError):  # a larger pipe means fewer wake-ups, no more
            _enlarge(we_write)
            _enlarge(we_read)
        ends = Ends(child_reads, child_writes, child_prints)
        try:
            pid = await start(environ, ends)
        except BaseException:
            _close(we_write, we_read, we_hear)
            raise
        finally:
            _close(*ends)
        return cls(pid, we_hear, NonBlockingChannel(we_read, we_write, codec))

    async def end(self) -> None:
        self.channel.close()
        await super().end()


async def start_program(command: Sequence[str], environ: Mapping[str, str], ends: Ends) -> int:
    """A worker of its own program; with `command` given, this is a Start."""
    arguments = ("--read-fd", str(ends.reads), "--write-fd", str(ends.writes))
    parent = ("--parent", str(os.getpid()))
    passed = (ends.reads, ends.writes)
    return _run([*command, *arguments, *parent], environ, passed, ends.output)


def start_child(command: Sequence[str], environ: Mapping[str, str], passed: Sequence[int]) -> Child:
    """A program that has the descriptors `passed` and is no worker. Raises OSError."""
    we_hear, child_prints = _pipes(1)
    try:
        return Child(_run(command, environ, passed, child_prints), we_hear)
    except OSError:
        _close(we_hear)
        raise
    finally:
        _close(child_prints)


def _run(
    command: Sequence[str], environ: Mapping[str, str], passed: Sequence[int], output: int
) -> int:
    """The id of a new process, which has no descriptors but its output and `passed`. Raises
    OSError."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environ,
        start_new_session=True,
        pass_fds=passed,
    )
    process.returncode = 0  # it is a Child that reaps it
    return process.pid


def reap_strays() -> None:
    """What workers have started and left behind in groups of their own becomes ours, where we are a
    subreaper, and is nobody's when it ends."""
    with suppress(ChildProcessError):
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (ended := os.waitid(os.P_ALL, 0, look)) and ended.si_pid not in waited_for:
            os.waitpid(ended.si_pid, os.WNOHANG)


def _reaped(process: int) -> Exit | None:
    """None while it lives; of a group, given as a negative number, any process that has ended.
    Raises ChildProcessError where there is none."""
    pid, status = os.waitpid(process, os.WNOHANG)
    return Exit(os.waitstatus_to_exitcode(status)) if pid else None


def _pipes(count: int) -> list[int]:
    """Descriptors in pairs, to read from and to write to."""
    descriptors: list[int] = []
    try:
        for _ in range(count):
            descriptors += os.pipe()
    except OSError:
        _close(*descriptors)
        raise
    return descriptors


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _text(line: bytes) -> str:
    return line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()


def _enlarge(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
