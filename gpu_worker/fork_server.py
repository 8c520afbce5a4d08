"""Imports what a worker needs, once, and forks a worker each time that the supervisor asks for one.

Libraries take 4 to 25 s to import, a fork takes milliseconds. A new worker is orphaned at once,
which makes it a child of the supervisor, who is a subreaper: it outlives this process and ends
with the supervisor as every worker does. Nothing here may touch a device: what CUDA has begun in
a process is of no use to those that are forked from it.
"""

import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ipc.forking import DESCRIPTORS, MAX_ORDER_BYTES, NOBODY, READY, decode_order

Life = Callable[[int, int], NoReturn]
"""A worker's, in its own process: on the descriptors that it reads and writes messages on."""
ORPHAN_POLL_SECONDS = 0.001
NO_WORKER = 1
"""How a worker's parent ends that has none."""


def serve(orders: socket.socket, imports: Callable[[], None], life: Life) -> None:
    """Returns when the supervisor has closed its end."""
    # Whether there is a device is asked by some library; this way it is the driver's own library
    # that is asked, not CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()
    imports()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or each worker would say it
    gc.freeze()  # so that no collection in a worker writes to the pages that all of them share
    orders.send(READY)
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, MAX_ORDER_BYTES, DESCRIPTORS)
        if not order:
            return
        if not _fork(order, descriptors, orders, life):
            orders.send(NOBODY)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork(order: bytes, descriptors: Sequence[int], orders: socket.socket, life: Life) -> bool:
    """False when there will be no worker; one that there is answers the order itself."""
    try:
        parent = os.fork()
    except OSError:
        traceback.print_exc()
        return False
    if parent == 0:
        _leave_orphan(order, descriptors, orders, life)
    _, status = os.waitpid(parent, 0)
    return os.waitstatus_to_exitcode(status) != NO_WORKER


def _leave_orphan(
    order: bytes, descriptors: Sequence[int], orders: socket.socket, life: Life
) -> NoReturn:
    code = NO_WORKER
    try:
        parent = os.getpid()
        if os.fork() == 0:
            _become_worker(order, descriptors, orders, life, parent)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _become_worker(
    order: bytes, descriptors: Sequence[int], orders: socket.socket, life: Life, parent: int
) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL_SECONDS)
    os.setsid()
    with orders:
        orders.send(b"%d" % os.getpid())
    read_fd, write_fd, output = descriptors
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(decode_order(order))
    life(read_fd, write_fd)
