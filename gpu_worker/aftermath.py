"""What is done after a job ran out of memory: the worker looks whether the memory came back.

It asks to be replaced where it did not. Used on the device thread alone.
"""

import gc
from typing import NoReturn

from gpu_worker import device
from gpu_worker.compilers import Compiler
from gpu_worker.engine import Engine, Task
from gpu_worker.loader import Loader
from gpu_worker.loop import Send
from gpu_worker.wear import worn
from ipc.messages import Start


class Aftermath:
    """Looks in a task that runs alone: only then is every byte either a model's or lost."""

    def __init__(
        self, start: Start, engine: Engine, loader: Loader, compiler: Compiler, send: Send
    ) -> None:
        self._start = start
        self._compiler = compiler
        self._engine = engine
        self._loader = loader
        self._send = send
        self._is_due = False

    def ran_out(self) -> None:
        """A job ended for want of memory, and its frames are cleared."""
        device.free(self._start)
        if not self._is_due:
            self._is_due = True
            self._engine.submit(Task(self, self._look, failed=_raise, alone=True))

    def _look(self) -> None:
        self._is_due = False
        self._compiler.give_way()  # graphs hold tensors of their own
        gc.collect()
        device.free(self._start)
        allocated = device.allocated_bytes(self._start)
        if allocated is None:
            return
        accounted = self._engine.wait_for(self._loader.call(self._held_bytes))
        found = worn(allocated, accounted, device.memory(self._start).total)
        if found is not None:
            self._send(found)

    def _held_bytes(self) -> int:
        return self._loader.library.held_bytes()


def _raise(error: Exception) -> NoReturn:
    """Where memory cannot even be counted the worker cannot go on."""
    raise error
