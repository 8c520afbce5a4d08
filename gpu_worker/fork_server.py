"""Imports what a worker needs, once, and forks a worker each time that the supervisor asks for one.

Libraries take 4 to 25 s to import, a fork takes milliseconds. A new worker is orphaned at once,
which makes it a child of the supervisor, who is a subreaper: it outlives this process and ends
with the supervisor as every worker does. Nothing here may touch a device: what CUDA has begun in
a process is of no use to those that are forked from it.
"""

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ipc.forking import DESCRIPTORS, MAX_ORDER_BYTES, READY, decode_order

Life = Callable[[int, int], NoReturn]
"""A worker's, in its own process: on the descriptors that it reads and writes messages on."""
ORPHAN_POLL_SECONDS = 0.001


def serve(orders: socket.socket, imports: Callable[[], None], life: Life) -> None:
    """Returns when the supervisor has closed its end."""
    # Whether there is a device is asked by some library; this way it is the driver's own library
    # that is asked, not CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()
    imports()
    gc.freeze()  # so that no collection in a worker writes to the pages that all of them share
    orders.send(READY)
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, MAX_ORDER_BYTES, DESCRIPTORS)
        if not order:
            return
        orders.send(b"%d" % _forked(order, descriptors, orders, life))
        for descriptor in descriptors:
            os.close(descriptor)


def _forked(order: bytes, descriptors: Sequence[int], orders: socket.socket, life: Life) -> int:
    """The id of a new worker's process, whose parent has gone by now."""
    hears, tells = os.pipe()
    parent = os.fork()
    if parent == 0:
        _leave_orphan(order, descriptors, orders, life, tells)
    os.close(tells)
    os.waitpid(parent, 0)
    pid = int(os.read(hears, MAX_ORDER_BYTES) or b"0")
    os.close(hears)
    return pid


def _leave_orphan(
    order: bytes, descriptors: Sequence[int], orders: socket.socket, life: Life, tells: int
) -> NoReturn:
    try:
        parent, worker = os.getpid(), os.fork()
        if worker == 0:
            os.close(tells)
            orders.close()
            _become_worker(order, descriptors, life, parent)
        os.write(tells, b"%d" % worker)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _become_worker(order: bytes, descriptors: Sequence[int], life: Life, parent: int) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL_SECONDS)
    os.setsid()
    read_fd, write_fd, output = descriptors
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(decode_order(order))
    life(read_fd, write_fd)
