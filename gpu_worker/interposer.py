"""Stands between pipelines and their modules: a module's method is replaced on the
instance by one that hands the call over. Owns the table of architectures whose
calls are known to be batch-first; knows nothing of jobs."""

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gpu_worker.batching import Arguments, Layout, NotBatchFirst, count_rows, group_key

IDS = frozenset({"img_ids", "txt_ids"})
TIMESTEP = frozenset({"timestep"})
GENERATOR = frozenset({"generator"})
# Decoding costs as much as several steps: a large batch of it would hold up everybody.
VAE_ROWS = 4

# The UNet and its ControlNets read one timestep for all rows or one a row, as float32
# (diffusers.models.embeddings.get_timestep_embedding).
UNET = Layout("sample", scalars=TIMESTEP)
TRANSFORMER = Layout("hidden_states")
POSITIONED = Layout("hidden_states", shared=IDS)
TEXT = Layout("input_ids", leads=True)


def _leading(layout: Layout) -> Layout:
    return replace(layout, leads=True)


def _vae(rows: str, leads: bool = False) -> Layout:
    return Layout(rows, unread=GENERATOR, max_rows=VAE_ROWS, leads=leads)


LAYOUTS: dict[tuple[str, str], Layout] = {
    ("UNet2DConditionModel", "forward"): UNET,
    ("ControlNetModel", "forward"): _leading(UNET),
    ("ControlNetUnionModel", "forward"): _leading(UNET),
    ("FluxTransformer2DModel", "forward"): POSITIONED,
    ("FluxControlNetModel", "forward"): _leading(POSITIONED),
    ("ChromaTransformer2DModel", "forward"): POSITIONED,
    ("SD3Transformer2DModel", "forward"): TRANSFORMER,
    ("SD3ControlNetModel", "forward"): _leading(TRANSFORMER),
    ("PixArtTransformer2DModel", "forward"): TRANSFORMER,
    ("SanaTransformer2DModel", "forward"): TRANSFORMER,
    ("SanaControlNetModel", "forward"): _leading(TRANSFORMER),
    ("AuraFlowTransformer2DModel", "forward"): TRANSFORMER,
    ("CLIPTextModel", "forward"): TEXT,
    ("CLIPTextModelWithProjection", "forward"): TEXT,
    ("T5EncoderModel", "forward"): TEXT,
    ("CLIPVisionModelWithProjection", "forward"): Layout("pixel_values", leads=True),
    ("AutoencoderKL", "encode"): _vae("x", leads=True),
    ("AutoencoderKL", "decode"): _vae("z"),
    ("AutoencoderTiny", "encode"): _vae("x", leads=True),
    ("AutoencoderTiny", "decode"): _vae("x"),
    ("AutoencoderDC", "encode"): _vae("x", leads=True),
    ("AutoencoderDC", "decode"): _vae("z"),
}


class Target:
    """One method of one module, as it was before it was replaced.

    Holds its module weakly: an evicted module's memory is free as soon as it is dropped.
    """

    def __init__(self, module: torch.nn.Module, method: str, layout: Layout | None) -> None:
        self._module = weakref.ref(module)
        self._replaced = module.__dict__.get(method)
        self._function = getattr(type(module), method)
        parameters = inspect.signature(getattr(module, method)).parameters.values()
        self._defaults = {parameter.name: parameter.default for parameter in parameters}
        self._positions = [
            parameter.name
            for parameter in parameters
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        self.method = method
        self.layout = layout
        self.architecture = type(module).__name__

    @property
    def module(self) -> torch.nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(f"cannot call {self.architecture}.{self.method}: it is gone")
        return module

    @property
    def is_denoiser(self) -> bool:
        """Whether its calls are steps. Neither what leads to them is one, nor what decodes their
        result; of what is not known, all is."""
        return self.layout is None or not (self.layout.leads or self.method == "decode")

    @property
    def is_gone(self) -> bool:
        return self._module() is None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The method itself, past the replacement."""
        if self._replaced is not None:
            return self._replaced(*args, **kwargs)
        return self._function(self.module, *args, **kwargs)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """All arguments by name, without those that say what their default says, so that
        pipelines that spell a call differently can share it. Raises NotBatchFirst for
        positional arguments without names."""
        if len(args) > len(self._positions):
            raise NotBatchFirst("cannot name all arguments")
        named = dict(zip(self._positions, args, strict=False)) | kwargs
        missing = inspect.Parameter.empty
        return {n: v for n, v in named.items() if v is not self._defaults.get(n, missing)}

    def restore(self) -> None:
        module = self.module
        if self._replaced is not None:
            setattr(module, self.method, self._replaced)
        else:
            module.__dict__.pop(self.method, None)


def described(
    target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Arguments, int, Hashable] | None:
    """A call's arguments by name, its rows and its key; None if it must run as it is."""
    if target.layout is None:
        return None
    try:
        arguments = target.named(args, kwargs)
        rows = count_rows(arguments, target.layout)
        return arguments, rows, (id(target), group_key(arguments, target.layout, rows))
    except NotBatchFirst:
        return None


Receiver = Callable[[Target, tuple[Any, ...], dict[str, Any]], Any]


def interpose(
    module: torch.nn.Module, method: str, receive: Receiver, layout: Layout | None = None
) -> None:
    """Sends calls of the module's method to `receive`; done once, however often it is asked.

    Without a layout the table's is taken; an architecture that is not in it has none.
    """
    if isinstance(getattr(module.__dict__.get(method), "target", None), Target):
        return
    known = LAYOUTS.get((type(module).__name__, method))
    target = Target(module, method, layout or known)

    # Pipelines look at their denoiser's signature.
    @functools.wraps(getattr(type(module), method))
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return receive(target, args, kwargs)

    replacement.target = target  # type: ignore[attr-defined]
    # A plain function on the instance is called without self, which its signature must say.
    replacement.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        getattr(module, method)
    )
    setattr(module, method, replacement)


def restore(module: torch.nn.Module) -> None:
    """Gives the module its own methods back."""
    for value in list(module.__dict__.values()):
        if isinstance(getattr(value, "target", None), Target):
            value.target.restore()


def interposable(components: Iterable[Any]) -> Iterator[tuple[torch.nn.Module, str]]:
    """The modules and methods of a pipeline's components that are worth a place in a batch.

    A bundle of ControlNets calls its nets one after another, so the nets are taken.
    """
    for component in components:
        if not isinstance(component, torch.nn.Module):
            continue
        if isinstance(nets := getattr(component, "nets", None), torch.nn.ModuleList):
            yield from interposable(nets)
        elif hasattr(component, "encode") and hasattr(component, "decode"):
            yield component, "encode"
            yield component, "decode"
        else:
            yield component, "forward"
