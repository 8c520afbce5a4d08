"""The real worker, with a fault that only an operator of tests can provoke.

When the file named by IGI_ASSERT_FILE appears, the next forward, on whichever worker takes
the file away first, breaks its device: on a GPU by a kernel's own assertion, after which no
call of the process's CUDA context works; on a CPU an error that looks like it.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_worker.__main__ import main


def is_due(file: Path) -> bool:
    """True once for all workers of a host."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def break_device(device: Any) -> None:
    """Not waited for: as with a kernel's bug, any later call meets the error."""
    import torch

    if device.type == "cpu":
        raise RuntimeError("CUDA error: device-side assert triggered (a stand-in on a CPU)")
    print("breaking the device", file=sys.stderr, flush=True)
    torch.tensor([1], device=device)[torch.tensor([7], device=device)]


def make_breakable(file: Path) -> None:
    """Before the engine runs a forward, so that it is no part of a graph or of compiled code."""
    from gpu_worker.forwards import Call, Forwards

    original = Forwards._executed

    @functools.wraps(original)
    def executed(self: Forwards, call: Call, *rest: Any) -> Any:
        if is_due(file):
            break_device(next(call.target.module.parameters()).device)
        return original(self, call, *rest)

    setattr(Forwards, "_executed", executed)  # noqa: B010 - a method is not assigned to


if __name__ == "__main__":
    main(lambda: make_breakable(Path(os.environ["IGI_ASSERT_FILE"])))
