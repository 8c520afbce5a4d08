"""The real worker on a CPU, with a device whose memory runs out and does not come back.

While the file named by IGI_OUT_OF_MEMORY_FILE is there, every text encoder runs out of memory;
IGI_ALLOCATED_BYTES is what the device's allocator says that it holds.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_worker import __main__ as process
from gpu_worker import guard, loop
from ipc.messages import Start


def make_leaky(file: Path, allocated: int) -> None:
    import torch
    from transformers import CLIPTextModel

    from gpu_worker import device

    original = CLIPTextModel.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if file.exists():
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in on a CPU)")
        return original(self, *args, **kwargs)

    CLIPTextModel.forward = forward
    device.allocated_bytes = lambda start: allocated


def main() -> NoReturn:
    given = process.arguments(sys.argv[1:])
    process.die_with_parent(given.parent)
    guard.start(given.read_fd, given.write_fd)
    os.environ.update(process.OFFLINE)

    def make_runner(start: Start, send: loop.Send) -> loop.Runner:
        file = Path(os.environ["IGI_OUT_OF_MEMORY_FILE"])
        make_leaky(file, int(os.environ["IGI_ALLOCATED_BYTES"]))
        from gpu_worker.runner import BatchingRunner

        return BatchingRunner(start, send)

    process.run(given, make_runner)


if __name__ == "__main__":
    main()
