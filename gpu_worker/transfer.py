"""Copies to and from the device that the engine's thread does not wait for. Finished pictures
are copied and turned into Pillow pictures by the thread that encodes them."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.overrides import TorchFunctionMode


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. From the host's memory, a GPU takes it when its turn comes."""
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    # Pinned as they lie, but for expanded ones, whose entries share their memory.
    expanded = any(tensor.stride(i) == 0 and tensor.size(i) > 1 for i in range(tensor.dim()))
    return (tensor.contiguous() if expanded else tensor).pin_memory().to(device, non_blocking=True)


def fill(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Each first one gets what the second holds, in its own type and order. Not waited for: see
    `settle`.

    By one call: with a call for each, whoever fills a thousand beside a busy thread waits for the
    interpreter as often, up to five milliseconds each time.
    """
    alike: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for place, source in pairs:
        if place.is_cuda and source.dtype != place.dtype:
            # Else the host converts it, at a tenth of the bus's speed. One by one: it takes room.
            place.copy_(source.to(place.device, non_blocking=True))
        else:
            alike[0].append(place)
            alike[1].append(source)
    if alike[0]:
        torch._foreach_copy_(*alike, non_blocking=True)


def settle(devices: Iterable[torch.device]) -> None:
    """Returns once all that was sent to these devices is there: its source may go."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


class Unwaited(TorchFunctionMode):
    """Within it, `.to(a GPU)` and `torch.tensor(…, device=a GPU)` are not waited for; else a copy
    of ordinary memory waits for all work.

    Pipelines copy prompts, noise and pictures so when they begin, ancestral schedulers noise at
    each step: the device would run dry while the engine's thread waits and then catches up.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            device, dtype = _wanted(args[1:], given)
            if device.type == "cuda":
                # Stock copies change the type on the host as well.
                return sent(args[0] if dtype is None else args[0].to(dtype), device)
        elif func is torch.tensor and torch.device(given.get("device") or "cpu").type == "cuda":
            made = torch.tensor(*args, **given | {"device": "cpu"})
            return sent(made, torch.device(given["device"]))
        return func(*args, **given)


def _wanted(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.device, torch.dtype | None]:
    """Where `Tensor.to` is to put a tensor of the host, and in which type. The host itself stands
    for all that is nothing to be sent."""
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except RuntimeError:
        # It knows no `copy`.
        return torch.device("cpu"), None
    return device if device and not memory_format else torch.device("cpu"), dtype


def unwaited(device: torch.device) -> AbstractContextManager[Any]:
    """May be entered again and again, on one thread at a time."""
    return Unwaited() if device.type == "cuda" else nullcontext()


class OnDevice:
    """What a VAE gave for one picture. `postprocess` is the pipeline's own last step."""

    def __init__(self, pixels: torch.Tensor, postprocess: Any) -> None:
        self._pixels = pixels
        self._postprocess = postprocess
        self._made: Any = torch.cuda.Event() if pixels.is_cuda else None  # type: ignore[no-untyped-call]
        if self._made is not None:
            self._made.record()

    def picture(self) -> Image.Image:
        """Called once, on any thread."""
        made: Image.Image = self._postprocess(self._on_host())[0]
        return made

    def _on_host(self) -> torch.Tensor:
        if self._made is None:
            return self._pixels
        # On a stream of its own: the usual one has other jobs' steps waiting by now.
        stream: Any = torch.cuda.Stream(self._pixels.device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._made)
        with torch.cuda.stream(stream):
            return self._pixels.cpu()


def stay_on_device(pipeline: Any) -> None:
    """Makes a job's own pipeline give OnDevice for its pictures, where it can be.

    A pipeline that looks at its pictures itself, to check them, has to have them.
    """
    processor: Any = getattr(pipeline, "image_processor", None)
    if type(processor) is not VaeImageProcessor or getattr(pipeline, "safety_checker", None):
        return
    own = processor.postprocess

    def postprocess(image: Any, output_type: str = "pil", **settings: Any) -> Any:
        if output_type != "pil" or not isinstance(image, torch.Tensor) or len(image) != 1:
            return own(image, output_type=output_type, **settings)
        return [OnDevice(image, partial(own, output_type="pil", **settings))]

    processor.postprocess = postprocess
