"""What a checkpoint is made of: read once from its folder or file, then known for as long as
the host holds its weights, so that it comes back without a file being opened.

Knows files, plans and small parts; holds nothing on the device.
"""

import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_worker import folders, single_files
from gpu_worker.failures import Refusal
from gpu_worker.host_copies import Weights
from gpu_worker.host_tier import CannotMap, HostTier
from gpu_worker.modules import Modules, Wanted, is_module
from gpu_worker.single_files import SingleFile
from gpu_worker.vaes import pipeline_upcasts
from ipc.messages import Model

MAX_KNOWN = 64


@dataclass(eq=False)
class Recipe:
    """A checkpoint's parts: `wanted` are to be made on the device; `small` ones, such as
    tokenizers, are here already. `settings` are the scalars of a pipeline's index, and None for
    parts that it says it has not."""

    model: Model
    pipeline: str
    settings: dict[str, Any]
    wanted: dict[str, Wanted]
    files: tuple[Path, ...]
    bytes: int
    dtype: torch.dtype
    small: dict[str, Any] = field(default_factory=dict)
    last_used: float = field(default_factory=time.time)

    def original(self, module: str, parameter: str) -> torch.Tensor | None:
        """A weight as the files have it, in the device's type; None where they are not mapped."""
        wanted = self.wanted.get(module)
        return None if wanted is None else wanted.original(parameter, self.dtype)


class Recipes:
    """Recipes that were used last."""

    def __init__(self, modules: Modules, host: HostTier, dtype: torch.dtype, device: str) -> None:
        self._modules = modules
        self._host = host
        self._dtype = dtype
        self._device = device
        self._known: OrderedDict[Hashable, Recipe] = OrderedDict()

    def checkpoint(self, model: Model) -> Recipe:
        """Raises BrokenModel, FileNotFoundError, Refusal."""
        key = (model.path, model.config, model.prediction_type)
        recipe = self._known.pop(key, None)
        if recipe is None or not self._host.holds(recipe.files):
            recipe = self._file(model) if model.single_file else self._folder(model)
        self._known[key] = recipe
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return recipe

    def held(self) -> list[Recipe]:
        """Those whose weights lie in the host's memory."""
        return [each for each in self._known.values() if self._host.holds(each.files)]

    def forget(self, path: str) -> bool:
        """Whether there was one."""
        gone = [key for key, each in self._known.items() if each.model.path == path]
        for key in gone:
            del self._known[key]
        return bool(gone)

    def weights(self, model: Model) -> Weights | None:
        """A single file's tensors, mapped; None where the stock reader is to say what is wrong."""
        try:
            return self._host.weights([Path(model.path)])
        except (CannotMap, OSError, ValueError):
            return None

    def _folder(self, model: Model) -> Recipe:
        root = existing_folder(model)
        index, kinds = _index(root, folders.LOADED_ON_REQUEST)
        parts = [root / name for name in kinds]
        size = folder_bytes(self._dtype, *parts)
        upcasts = pipeline_upcasts(str(index.get("_class_name")))
        wanted = {
            name: self._modules.of_folder(root / name, kind, name == "vae" and upcasts)
            for name, kind in kinds.items()
        }
        files = [file for part in parts for file in folders.weights(part, self._dtype)]
        return self._recipe(model, index, wanted, files, size)

    def _file(self, model: Model) -> Recipe:
        file = SingleFile(model, self.weights(model))
        index, kinds = _index(file.config, single_files.NOT_HELD)
        upcasts = pipeline_upcasts(str(index.get("_class_name")))
        wanted = {
            name: self._modules.of_file(file.plan(name, kind), model, name == "vae" and upcasts)
            if is_module(kind)
            else Wanted(partial(file.load_part, name, kind, self._dtype, self._device))
            for name, kind in kinds.items()
        }
        return self._recipe(model, index, wanted, [Path(model.path)], file.bytes(self._dtype))

    def _recipe(
        self,
        model: Model,
        index: dict[str, Any],
        wanted: dict[str, Wanted],
        files: list[Path],
        size: int,
    ) -> Recipe:
        settings = dict.fromkeys(folders.parts(index)) | folders.scalars(index)
        pipeline = str(index.get("_class_name"))
        return Recipe(model, pipeline, settings, wanted, tuple(files), size, self._dtype)


def existing_folder(model: Model) -> Path:
    """Raises Refusal, FileNotFoundError."""
    root = Path(model.path)
    root.stat()
    if not root.is_dir():
        detail = f"cannot load {model.name!r}: it is a file, not a Diffusers folder"
        raise Refusal("invalid_model", detail)
    return root


def folder_bytes(dtype: torch.dtype, *parts: Path) -> int:
    """What some parts will take, once it is known that they are safetensors."""
    for part in parts:
        folders.refuse_other_weights(part)
    return sum(folders.weights_bytes(part, dtype) for part in parts)


def _index(root: Path, left: frozenset[str]) -> tuple[dict[str, Any], dict[str, type[Any]]]:
    """A pipeline's index, and the classes of the parts that it lists, but for some."""
    index = folders.read_json(root / folders.PIPELINE_INDEX)
    listed = folders.parts(index)
    present = {name: part for name, part in listed.items() if part and name not in left}
    return index, {name: folders.part_class(*part) for name, part in present.items()}
