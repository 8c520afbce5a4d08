"""A worker's process: its descriptors, its parent and its last act.

`python -m gpu_worker --read-fd N --write-fd M [--parent PID]`. Imports nothing
heavy before the environment keeps the model libraries off the network.
"""

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpu_worker import guard, loop
from ipc.channel import BlockingChannel, Codec
from ipc.messages import Start, ToWorker

PR_SET_PDEATHSIG = 1
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`read_fd`, `write_fd` and `parent` (a process id or None)."""
    parser = argparse.ArgumentParser(prog="gpu_worker")
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    parser.add_argument("--parent", type=int)
    return parser.parse_args(argv)


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


def run(given: argparse.Namespace, make_runner: loop.MakeRunner) -> NoReturn:
    """Serve on the descriptors until told to stop, or until the supervisor has gone."""
    signal.signal(signal.SIGTERM, lambda *_: end(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel: loop.Channel = BlockingChannel(given.read_fd, given.write_fd, Codec(ToWorker))
    end(loop.serve(channel, make_runner))


def main() -> NoReturn:
    given = arguments(sys.argv[1:])
    die_with_parent(given.parent)
    guard.start(given.read_fd, given.write_fd)
    os.environ.update(OFFLINE)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("gpu_worker").setLevel(logging.INFO)  # the supervisor reads standard error

    def make_runner(start: Start, send: loop.Send) -> loop.Runner:
        # Libraries make hundreds of thousands of objects that stay: to look for garbage among them
        # takes a quarter of the start.
        gc.disable()
        from gpu_worker.runner import BatchingRunner

        runner = BatchingRunner(start, send)
        gc.enable()
        return runner

    run(given, make_runner)


if __name__ == "__main__":
    main()
