"""Modules on the device: built once for each architecture, then given other checkpoints'
weights in place.

Knows plans, weights on the host and storage on the device; nothing of jobs or budgets.
"""

import gc
import inspect
import json
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin

from gpu_worker import folders, single_files
from gpu_worker.folders import BrokenModel
from gpu_worker.host_copies import HostCopies, Weights
from gpu_worker.host_tier import CannotMap, HostTier, identity
from gpu_worker.single_files import Plan
from gpu_worker.slots import DoesNotFit, Spares, exchange, lay_out, lookup, signature, skeleton
from gpu_worker.vaes import settled
from ipc.messages import Model


@dataclass(frozen=True, eq=False)
class Wanted:
    """A part to be made. `load` is the stock way, the only one where there is no plan.

    `exact`: weights of no place are an error. `settles`: a VAE that pipelines would move
    to float32 is there already.
    """

    load: Callable[[], Any]
    plan: Plan | None = None
    key: Hashable = None
    exact: bool = False
    settles: bool = False

    def original(self, parameter: str, dtype: torch.dtype) -> torch.Tensor | None:
        """A parameter as the file has it, in the module's type."""
        found = None if self.plan is None else lookup(self.plan.weights, parameter)
        return None if found is None else found.to(dtype)


class Modules:
    """Makes parts on one device. Modules that are dropped give their storage to others."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        host: HostTier,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        self._memory_format = memory_format
        self._host = host
        self._copies = HostCopies(host.max_bytes)
        self._spares = Spares()
        self._let_go = False
        self._keys: weakref.WeakKeyDictionary[Any, Hashable] = weakref.WeakKeyDictionary()

    def of_folder(self, folder: Path, kind: type[Any], upcasts: bool = False) -> Wanted:
        """What a folder holds. `upcasts`: a VAE for pipelines that decode in float32."""

        def load() -> Any:
            part = folders.load_part(folder, kind, self._dtype)
            return part.to(self._device) if isinstance(part, torch.nn.Module) else part

        try:
            is_there = is_module(kind) and folder.is_dir()
            plan = self._folder_plan(folder, kind) if is_there else None
        except (BrokenModel, CannotMap, OSError, ValueError):
            plan = None  # the stock way says what is wrong with it
        return self._wanted(load, plan, upcasts, False)

    def of_file(self, plan: Plan, model: Model, upcasts: bool = False) -> Wanted:
        """What a model's single file holds."""
        part = (plan.kind, model.config)

        def ready(weights: Weights) -> Weights:
            if self._device.type != "cpu":
                return single_files.copied_to(str(self._device), self._dtype)(weights)
            return self._copies.take((identity(Path(model.path)), part), weights, self._dtype)

        return self._wanted(lambda: single_files.built(plan, ready), plan, upcasts, True)

    def reserve(self, wanted: Iterable[Wanted]) -> None:
        """Lets go of all spare storage that none of these will take."""
        # A collection takes a tenth of a second or more; an exchange in place needs none.
        useless = self._spares.keep_only(each.key for each in wanted)
        if useless or self._let_go:
            self._free()

    def make(self, wanted: Wanted) -> Any:
        """The part; a module in evaluation mode, on the device, its type settled.

        Raises BrokenModel, and what from_pretrained raises.
        """
        module = None if wanted.plan is None else self._spares.take(wanted.key)
        if module is None or not self._filled(module, wanted):
            module = self._new(wanted)
            if isinstance(module, torch.nn.Module):
                lay_out(module, self._memory_format)
            module = settled(module) if wanted.settles else module
        if wanted.key is not None:
            self._keys[module] = wanted.key
        return module

    def spare(self, parts: Mapping[str, Any]) -> None:
        """A model was dropped to make room: its storage may be taken over."""
        for part in parts.values():
            if not isinstance(part, torch.nn.Module):
                continue
            if part in self._keys:
                self._spares.put(self._keys[part], part)
            else:
                self._let_go = True

    def free(self) -> None:
        """Gives all storage that nobody uses back to the device."""
        self._spares.keep_only(())
        self._free()

    def free_host(self) -> None:
        """Gives the memory of copies that nobody uses back to the host."""
        self._copies.clear()

    def _folder_plan(self, folder: Path, kind: type[Any]) -> Plan:
        """Raises BrokenModel, CannotMap, OSError, ValueError."""
        files = folders.weights(folder, self._dtype)
        if not files:
            raise BrokenModel("it has no safetensors")
        return Plan(kind, _config(folder, kind), self._host.weights(files))

    def _wanted(
        self, load: Callable[[], Any], plan: Plan | None, upcasts: bool, exact: bool
    ) -> Wanted:
        if plan is None:
            return Wanted(load, settles=upcasts)
        settings = _settings(plan)
        settles = upcasts and bool(settings.get("force_upcast"))
        key = (signature(plan.kind, settings, self._dtype), settles)
        return Wanted(load, plan, key, exact, settles)

    def _new(self, wanted: Wanted) -> Any:
        # On a CPU the file's own pages serve as weights, as in stock Diffusers.
        if self._device.type != "cpu" and wanted.plan is not None:
            dtype = torch.float32 if wanted.settles else self._dtype
            module = skeleton(wanted.plan.kind, wanted.plan.config, dtype, self._device)
            if module is not None and self._filled(module, wanted):
                return module
        return wanted.load()

    def _filled(self, module: torch.nn.Module, wanted: Wanted) -> bool:
        weights = {} if wanted.plan is None else wanted.plan.weights
        try:
            if wanted.exact and weights.keys() != module.state_dict().keys():
                return False
            exchange(module, weights)
        except DoesNotFit:
            return False
        return True

    def _free(self) -> None:
        self._let_go = False
        gc.collect()
        if self._device.type != "cpu":
            torch.cuda.empty_cache()


def is_module(kind: type[Any]) -> bool:
    return issubclass(kind, (ModelMixin, transformers.PreTrainedModel))


def _config(folder: Path, kind: type[Any]) -> Any:
    """As Plan has it: a dictionary for Diffusers' models, else a configuration object."""
    if issubclass(kind, ModelMixin):
        return folders.read_json(folder / "config.json")
    return kind.config_class.from_pretrained(str(folder), local_files_only=True)


def _settings(plan: Plan) -> dict[str, Any]:
    """A configuration without what its class would take anyway, so that old files' match new."""
    if not issubclass(plan.kind, ModelMixin):
        told: dict[str, Any] = plan.config.to_dict()
        return {name: json.dumps(value, default=str) for name, value in told.items()}
    parameters = inspect.signature(plan.kind.__init__).parameters
    accepted = {name: each.default for name, each in parameters.items() if name != "self"}
    full = accepted | {name: value for name, value in plan.config.items() if name in accepted}
    # As text, since a tuple and JSON's list are the same setting.
    settings = {name: json.dumps(value, default=str) for name, value in full.items()}
    return settings | {"force_upcast": bool(full.get("force_upcast"))}
