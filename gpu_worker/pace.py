"""How far the engine's thread may run ahead of the device, which takes orders without waiting."""

from collections.abc import Callable
from typing import Any

import torch


class Pace:
    """Called after each step was ordered: returns once the one before it is done.

    So the device always has the next step at hand, and a job that is cancelled, begins or has
    priority waits for no more than that and what leads to it. Without it a pipeline that never
    asks the device for anything orders all of its steps at once. Raises what a failed forward
    raises.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def __call__(self) -> None:
        # A blocking event leaves the processor to the threads that encode pictures.
        ordered: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ordered.record()
        before, self._before = self._before, ordered
        if before is not None:
            before.synchronize()


def pace_of(device: torch.device) -> Callable[[], None]:
    """A CPU does nothing behind our back."""
    return Pace() if device.type == "cuda" else lambda: None
