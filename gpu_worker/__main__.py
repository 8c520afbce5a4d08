"""A worker's process: its descriptors, its parent and its last act.

`python -m gpu_worker --read-fd N --write-fd M [--parent PID]`, or with `--fork-server FD` for a
process that is forked into workers (fork_server.py). Imports nothing heavy before the environment
keeps the model libraries off the network.
"""

import argparse
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from gpu_worker import fork_server, guard, loop
from ipc.channel import BlockingChannel, Codec
from ipc.messages import Start, ToWorker

PR_SET_PDEATHSIG = 1
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`read_fd` and `write_fd`, or `fork_server`, a socket; `parent`, a process id or None."""
    parser = argparse.ArgumentParser(prog="gpu_worker")
    parser.add_argument("--read-fd", type=int)
    parser.add_argument("--write-fd", type=int)
    parser.add_argument("--fork-server", type=int)
    parser.add_argument("--parent", type=int)
    given = parser.parse_args(argv)
    if given.fork_server is None and None in (given.read_fd, given.write_fd):
        parser.error("--read-fd and --write-fd are required")
    return given


def die_with_parent(parent: int | None) -> None:
    """Have the kernel end this process with its parent; exits if that has gone already.

    Where there are no such signals (not Linux), the end of the pipe does it alone.
    """
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def end(code: int) -> NoReturn:
    """Exit without the libraries' own farewells, which can take seconds or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def work(prepare: Callable[[], None], parent: int | None, read_fd: int, write_fd: int) -> NoReturn:
    """A worker's life: serve on the descriptors until told to stop, or until the supervisor has
    gone. `prepare` is called when all is imported."""
    die_with_parent(parent)
    guard.start(read_fd, write_fd)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("gpu_worker").setLevel(logging.INFO)  # the supervisor reads standard error
    signal.signal(signal.SIGTERM, lambda *_: end(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def make_runner(start: Start, send: loop.Send) -> loop.Runner:
        # Libraries make hundreds of thousands of objects that stay: to look for garbage among them
        # takes a quarter of the start.
        gc.disable()
        from gpu_worker.runner import BatchingRunner

        prepare()
        runner = BatchingRunner(start, send)
        gc.enable()
        return runner

    channel: loop.Channel = BlockingChannel(read_fd, write_fd, Codec(ToWorker))
    end(loop.serve(channel, make_runner))


def imports() -> None:
    """The libraries, which take long; a worker that was forked after it has them."""
    import gpu_worker.runner  # noqa: F401


def begin(life: Callable[[int | None, int, int], NoReturn], imports: Callable[[], None]) -> None:
    """What the command line asks for: one life, or a server that forks lives."""
    given = arguments(sys.argv[1:])
    os.environ.update(OFFLINE)
    own = partial(life, given.parent)
    if given.fork_server is None:
        own(given.read_fd, given.write_fd)
    die_with_parent(given.parent)
    with socket.socket(fileno=given.fork_server) as orders:
        fork_server.serve(orders, imports, own)


def main(prepare: Callable[[], None] = lambda: None) -> None:
    begin(partial(work, prepare), imports)


if __name__ == "__main__":
    main()
