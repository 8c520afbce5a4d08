"""Weights that lie ready in the host's memory for a CPU's modules: of their type, on boundaries.

Off 16 bytes a CPU's matrix products round otherwise, which was seen to change a picture by 1e-5
of its range; single files have their tensors where they happen to end up, on multiples of 8.
"""

import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

Weights = dict[str, torch.Tensor]

BOUNDARY_BYTES = 64


class HostCopy:
    """A copy of some weights. Whoever takes it writes to pages of its own, never to the copy.

    It lies in a file of the memory that has no name, and is freed with the last who uses it.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.bytes = 0
        self._dtype = dtype
        self._places: dict[str, tuple[int, torch.Size]] = {}
        for name, tensor in weights.items():
            self._places[name] = (self.bytes, tensor.shape)
            self.bytes += -(-tensor.numel() * dtype.itemsize // BOUNDARY_BYTES) * BOUNDARY_BYTES
        self._descriptor = os.memfd_create("weights")
        weakref.finalize(self, os.close, self._descriptor)
        os.truncate(self._descriptor, self.bytes)
        # Written rather than copied to a mapping, which takes 1.7 times as long by its faults.
        with open(self._descriptor, "wb", closefd=False) as file:
            for name, (begin, _) in self._places.items():
                file.seek(begin)
                file.write(_content(weights[name].to(dtype)))

    def weights(self) -> Weights:
        """By name; mapped anew, so that what is written to them is seen nowhere else."""
        mapping = mmap.mmap(self._descriptor, self.bytes, mmap.MAP_PRIVATE)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        found: Weights = {}
        for name, (begin, shape) in self._places.items():
            end = begin + shape.numel() * self._dtype.itemsize
            found[name] = whole[begin:end].view(self._dtype).view(shape)
        return found


class HostCopies:
    """The copies that were used last, within `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[Hashable, HostCopy] = OrderedDict()

    def take(self, key: Hashable, weights: Weights, dtype: torch.dtype) -> Weights:
        """The weights of this key in this type, copied when they are first asked for; whoever
        takes them may write to them."""
        copy = self._held.pop((key, dtype), None) or HostCopy(weights, dtype)
        while self._held and self.bytes + copy.bytes > self._max_bytes:
            self._held.popitem(last=False)
        if copy.bytes <= self._max_bytes:
            self._held[key, dtype] = copy
        return copy.weights()

    @property
    def bytes(self) -> int:
        return sum(copy.bytes for copy in self._held.values())

    def clear(self) -> None:
        """Their memory is free once no module uses it."""
        self._held.clear()


def _content(tensor: torch.Tensor) -> Any:
    """Its bytes, as something that a file takes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
