"""The real worker's process for tests that put a fault into it first."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from gpu_worker import __main__ as process
from gpu_worker import guard, loop
from ipc.messages import Start


def serve(prepare: Callable[[], None]) -> NoReturn:
    """Serves as `python -m gpu_worker` does, once `prepare` has changed what it likes."""
    given = process.arguments(sys.argv[1:])
    process.die_with_parent(given.parent)
    guard.start(given.read_fd, given.write_fd)
    os.environ.update(process.OFFLINE)

    def make_runner(start: Start, send: loop.Send) -> loop.Runner:
        prepare()
        from gpu_worker.runner import BatchingRunner

        return BatchingRunner(start, send)

    process.run(given, make_runner)
