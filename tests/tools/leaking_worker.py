"""The real worker on a CPU, with a device whose memory runs out and does not come back.

The file named by IGI_OUT_OF_MEMORY_FILE says in which part memory runs out and how many times,
such as `unet 1`; it is gone when that is over. IGI_ALLOCATED_BYTES is what the device's allocator
says that it holds.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_worker.__main__ import main


def is_due(file: Path, part: str) -> bool:
    """Whether memory runs out here and now; counts it."""
    wanted, times = (*file.read_text().split(), "0")[:2] if file.exists() else ("", "0")
    if wanted != part:
        return False
    if int(times) > 1:
        file.write_text(f"{part} {int(times) - 1}")
    else:
        file.unlink()
    return True


def make_short(kind: Any, method: str, part: str, file: Path) -> None:
    import torch

    original = getattr(kind, method)

    @functools.wraps(original)
    def short(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_due(file, part):
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in on a CPU)")
        return original(self, *args, **kwargs)

    setattr(kind, method, short)


def make_leaky(file: Path, allocated: int) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from gpu_worker import device

    make_short(CLIPTextModel, "forward", "text_encoder", file)
    make_short(UNet2DConditionModel, "forward", "unet", file)
    make_short(AutoencoderKL, "decode", "vae", file)
    device.allocated_bytes = lambda start: allocated


if __name__ == "__main__":
    file, allocated = os.environ["IGI_OUT_OF_MEMORY_FILE"], os.environ["IGI_ALLOCATED_BYTES"]
    main(lambda: make_leaky(Path(file), int(allocated)))
