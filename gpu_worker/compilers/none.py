"""No compiler: every call runs as its module is written."""

from typing import Any

import torch

from gpu_worker.compilers import Function
from gpu_worker.interposer import Target


class Uncompiled:
    """The stock modules' own numbers, bit for bit."""

    buckets: tuple[int, ...] | None = None
    memory_format = torch.contiguous_format

    def function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        return target.run

    def run(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return target.run(*args, **kwargs)

    def give_way(self) -> bool:
        return False

    def close(self) -> None:
        pass
