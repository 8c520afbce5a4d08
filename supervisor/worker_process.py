"""Spawns, signals and reaps ONE child process; the only user of subprocesses.

The child leads a session of its own, so that a signal to its group reaches
whatever it started. What it prints is drained line by line into the log.
"""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress

import anyio
import anyio.abc
import msgspec

from ipc.channel import Codec, NonBlockingChannel
from ipc.messages import FromWorker, ToWorker

COMMAND = (sys.executable, "-m", "gpu_worker")
MAX_LINE_BYTES = 4000
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


class WorkerProcess:
    """A child that lives, and its channel."""

    def __init__(
        self, process: anyio.abc.Process, channel: NonBlockingChannel[ToWorker, FromWorker]
    ) -> None:
        self._process = process
        self.channel = channel
        self.pid = process.pid
        self._group_ended = False

    @classmethod
    async def spawn(
        cls,
        environ: Mapping[str, str],
        codec: Codec[ToWorker, FromWorker],
        command: Sequence[str] = COMMAND,
    ) -> "WorkerProcess":
        """Called on the main thread: parent-death signals follow the spawning thread."""
        child_reads, we_write = os.pipe()
        try:
            we_read, child_writes = os.pipe()
        except OSError:
            os.close(child_reads)
            os.close(we_write)
            raise
        with suppress(OSError):  # a larger pipe means fewer wake-ups, no more
            _enlarge(we_write)
            _enlarge(we_read)
        channel = NonBlockingChannel(we_read, we_write, codec)
        descriptors = ("--read-fd", str(child_reads), "--write-fd", str(child_writes))
        try:
            process = await anyio.open_process(
                [*command, *descriptors, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                start_new_session=True,
                pass_fds=(child_reads, child_writes),
            )
        except BaseException:
            channel.close()
            raise
        finally:
            os.close(child_reads)
            os.close(child_writes)
        return cls(process, channel)

    async def lines(self) -> AsyncIterator[str]:
        """What the child prints, until it closes its output."""
        assert self._process.stdout is not None
        rest = b""
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for chunk in self._process.stdout:
                *whole, rest = (rest + chunk).split(b"\n")
                if len(rest) > MAX_LINE_BYTES:
                    whole, rest = [*whole, rest], b""
                for line in whole:
                    yield _text(line)
        if rest:
            yield _text(rest)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def wait(self) -> Exit:
        """Waits for the process to be reaped and ends what is left of its group.

        The library's own wait also waits for the pipes, which a grandchild may hold.
        """
        with suppress(OSError):  # no such descriptors here, or reaped already
            descriptor = os.pidfd_open(self.pid)
            try:
                await anyio.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        while (code := self._process.returncode) is None:  # noqa: ASYNC110 - reaped by now
            await anyio.sleep(REAP_POLL_SECONDS)
        self.kill()
        self._group_ended = True  # from now on the number may be somebody else's
        return Exit(code)

    async def end(self) -> None:
        """Kills what still lives and closes every descriptor."""
        self.kill()
        self.channel.close()
        with anyio.move_on_after(REAP_SECONDS):
            await self._process.aclose()
        _reap_group(self.pid)

    def _signal(self, number: signal.Signals) -> None:
        if self._group_ended:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _text(line: bytes) -> str:
    return line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()


def _enlarge(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _reap_group(group: int) -> None:
    """The worker's own children become ours where we are process 1 of a container."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
