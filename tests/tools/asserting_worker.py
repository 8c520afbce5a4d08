"""The real worker, with a fault that only an operator of tests can provoke.

When the file named by IGI_ASSERT_FILE appears, the next text encoder to run, on whichever
worker takes the file away first, breaks its device: on a GPU by a kernel's own assertion,
after which no call of the process's CUDA context works; on a CPU an error that looks like it.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.tools.real_worker import serve


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
    """Text encoders are never compiled or captured, so their forward runs as it is written."""
    from transformers import CLIPTextModel

    original = CLIPTextModel.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_due(file):
            break_device(self.device)
        return original(self, *args, **kwargs)

    CLIPTextModel.forward = forward


if __name__ == "__main__":
    serve(lambda: make_breakable(Path(os.environ["IGI_ASSERT_FILE"])))
