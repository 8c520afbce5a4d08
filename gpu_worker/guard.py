"""Ends the worker's whole process group once its supervisor is gone, whatever the worker does.

A parent-death signal reaches the worker alone: what it has started, such as compilers,
would live on. So a small forked process waits for the end of the supervisor's pipe, which
comes with the supervisor's death however it died.
"""

import os
import select
import signal
import time

GRACE_SECONDS = 1.0
"""The worker sees the same end and exits by itself, unless it cannot."""


def start(read_fd: int, write_fd: int) -> None:
    """Called first of all, while this process has one thread. Does nothing for a process
    that shares its group with others, as one started by hand does."""
    if os.getpgrp() != os.getpid() or os.fork():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Whoever reads these waits for the worker's end, not for the guard's.
    for descriptor in (write_fd, 1, 2):
        os.close(descriptor)
    waiting = select.poll()
    waiting.register(read_fd, 0)  # nothing but the end is reported
    waiting.poll()
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)
