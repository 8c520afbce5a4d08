"""The models that this worker holds: loaded once, shared by jobs, dropped when room is needed.

Knows paths, bytes and who uses what; knows no requests. One thread uses it.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor

from gpu_worker import adapters, folders, single_files
from gpu_worker.adapters import AdapterState
from gpu_worker.failures import (
    JobCancelled,
    MemoryShort,
    Refusal,
    is_device_failure,
    is_out_of_memory,
)
from gpu_worker.folders import BrokenModel
from gpu_worker.host_tier import HostTier
from gpu_worker.lora_files import Lora, LoraFiles
from gpu_worker.modules import Modules, Wanted
from gpu_worker.recipes import Recipe, Recipes, existing_folder, folder_bytes
from ipc.messages import Model, Resident

Kind = Literal["checkpoint", "vae", "controlnet", "safety_checker"]
Nothing = Callable[[], None]

HOST_BYTES = 16 * 2**30

ADAPTED = ("unet", "text_encoder", "text_encoder_2")
FIELDS: dict[Kind, str] = {
    "checkpoint": "checkpoint",
    "vae": "vae",
    "controlnet": "control_model",
    "safety_checker": "safety_checker",
}


@dataclass
class Holding:
    """One model in memory. `parts` are its modules and settings by the pipelines' names."""

    model: Model
    kind: Kind
    parts: dict[str, Any]
    bytes: int
    pipeline: str = ""
    """The class that a checkpoint's folder names."""
    vae: str | None = None
    """The VAE that was last used with a checkpoint."""
    last_used: float = field(default_factory=time.time)
    users: int = 0
    loras: tuple[str, ...] = ()
    """The names of the LoRAs that are merged into a checkpoint."""
    recipe: Recipe | None = None
    """What a checkpoint was made of."""

    @property
    def module(self) -> Any:
        """The one module of what is not a checkpoint."""
        return self.parts["module"]

    @functools.cached_property
    def adapters(self) -> AdapterState:
        """What is merged into a checkpoint's modules."""
        modules = {name: self.parts[name] for name in ADAPTED if self.parts.get(name) is not None}
        if self.recipe is None:
            return AdapterState(self.model.name, modules)
        return AdapterState(self.model.name, modules, self.recipe.original)

    def clear(self) -> None:
        """Lets go of the modules."""
        self.parts.clear()
        self.__dict__.pop("adapters", None)


class Library:
    """Holds models on one device within `budget_bytes`; `changed` is called when that changes."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        budget_bytes: int,
        changed: Nothing,
        host_bytes: int = HOST_BYTES,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.budget_bytes = budget_bytes
        self._changed = changed
        self._loras = LoraFiles()
        host = HostTier(device, host_bytes)
        self._modules = Modules(device, dtype, host)
        self._recipes = Recipes(self._modules, host, dtype, device)
        self._held: dict[Hashable, Holding] = {}

    @contextlib.contextmanager
    def use(self, *holdings: Holding) -> Iterator[None]:
        """Keeps models from being dropped while a job uses them."""
        for holding in holdings:
            holding.users += 1
        try:
            yield
        finally:
            for holding in holdings:
                holding.users -= 1
                holding.last_used = time.time()

    def checkpoint(self, model: Model, step: Nothing = lambda: None) -> Holding:
        """Loads a checkpoint where it is not held. `step` is called between its parts.

        Raises Refusal, MemoryShort, or what `step` raises.
        """
        return self._get("checkpoint", model, lambda: self._read_checkpoint(model, step))

    def vae(self, model: Model, upcasts: bool) -> Holding:
        """A VAE of its own; `upcasts`: it is for pipelines that decode in float32."""
        return self._get("vae", model, lambda: self._read_module(model, "vae", upcasts), upcasts)

    def controlnet(self, model: Model) -> Holding:
        return self._get("controlnet", model, lambda: self._read_module(model, "controlnet"))

    def safety_checker(self, model: Model) -> Holding:
        """Its `module` and its `feature_extractor`."""
        return self._get("safety_checker", model, lambda: self._read_safety_checker(model))

    def pair(self, checkpoint: Holding, vae: Holding) -> None:
        """Notes which VAE a checkpoint was last used with."""
        if checkpoint.vae != vae.model.name:
            checkpoint.vae = vae.model.name
            self._changed()

    def lora(self, model: Model, checkpoint: Holding) -> Lora:
        """A LoRA for a checkpoint, in host memory. Raises Refusal."""
        try:
            return self._loras.get(model, checkpoint.parts.get("unet"))
        except OSError as error:
            detail = f"cannot load {model.name!r}: it is not there any more"
            raise Refusal("unknown_model", detail, "loras") from error

    def adapt(self, checkpoint: Holding, wanted: adapters.Wanted) -> None:
        """Merges exactly these LoRAs into a checkpoint's weights. Raises Refusal."""
        if checkpoint.adapters.ensure(wanted):
            checkpoint.loras = tuple(lora.name for lora, _ in wanted)
            self._changed()

    def unload(self, path: str) -> bool:
        """Drops a checkpoint that nobody uses; whether there was one."""
        held = [h for h in self._held.values() if (h.kind, h.model.path) == ("checkpoint", path)]
        idle = [holding for holding in held if not holding.users]
        for holding in idle:
            self._drop(holding)
            self._recipes.forget(path)
        self._modules.free()
        known = bool(idle) or (not held and self._recipes.forget(path))
        if known:
            self._changed()
        return known

    def residents(self) -> list[Resident]:
        """The checkpoints on the device, then those whose files are mapped for it on the host."""
        there = [held for held in self._held.values() if held.kind == "checkpoint"]
        paths = {holding.model.path for holding in there}
        # A CPU has no tier of its own: what its file's pages hold is the system's affair.
        beside = [] if self.device == "cpu" else self._recipes.held()
        return [_on_device(holding) for holding in there] + [
            _on_host(recipe) for recipe in beside if recipe.model.path not in paths
        ]

    def drop_idle(self) -> bool:
        """Frees all that no job uses; whether there was any."""
        idle = [held for held in self._held.values() if not held.users]
        for holding in idle:
            self._drop(holding)
        self._modules.free()
        self._modules.free_host()
        self._changed()
        return bool(idle)

    def _get(
        self, kind: Kind, model: Model, read: Callable[[], Holding], upcasts: bool = False
    ) -> Holding:
        # The same file is another model under another configuration.
        key = (kind, model.path, model.config, model.prediction_type, upcasts)
        if key not in self._held:
            with _said_of(kind, model):
                holding = read()
            self._held[key] = holding
            self._changed()
        holding = self._held[key]
        holding.last_used = time.time()
        if holding.model != model:  # asked for by another of its names
            holding.model = model
            self._changed()
        return holding

    def _read_checkpoint(self, model: Model, step: Nothing) -> Holding:
        recipe = self._recipes.checkpoint(model)
        self._make_room(recipe.bytes, model)
        missing = {name: part for name, part in recipe.wanted.items() if name not in recipe.small}
        made = self._made(missing, step)
        for name, part in made.items():
            if not isinstance(part, torch.nn.Module):
                recipe.small[name] = part
        if "scheduler" in made:
            told = model.prediction_type
            changed = single_files.with_prediction_type(made["scheduler"], told)
            recipe.small["scheduler"] = changed
        parts = recipe.settings | made | recipe.small
        return Holding(model, "checkpoint", parts, recipe.bytes, recipe.pipeline, recipe=recipe)

    def _made(self, wanted: dict[str, Wanted], step: Nothing) -> dict[str, Any]:
        """All parts; whatever is raised, no spare storage is left."""
        held = {}
        self._modules.reserve(wanted.values())
        try:
            for name, part in wanted.items():
                step()
                held[name] = self._modules.make(part)
        finally:
            self._modules.reserve(())
        return held

    def _read_module(self, model: Model, kind: Kind, upcasts: bool = False) -> Holding:
        if model.single_file:
            plan = single_files.module_plan(model, kind, self._recipes.weights(model))
            size = single_files.tensor_bytes(plan.weights, self.dtype)
            wanted = self._modules.of_file(plan, model, upcasts)
        else:
            root = existing_folder(model)
            size = folder_bytes(self.dtype, root)
            wanted = self._modules.of_folder(root, folders.module_class(root), upcasts)
        self._make_room(size, model)
        return Holding(model, kind, self._made({"module": wanted}, lambda: None), size)

    def _read_safety_checker(self, model: Model) -> Holding:
        root = existing_folder(model)
        size = folder_bytes(self.dtype, root)
        self._make_room(size, model)
        # Within a checkpoint its pictures are prepared as the folder beside it says.
        beside = root.parent / "feature_extractor"
        extractor = next(
            (each for each in (root, beside) if (each / "preprocessor_config.json").is_file()), None
        )
        parts = self._made(
            {"module": self._modules.of_folder(root, StableDiffusionSafetyChecker)}, lambda: None
        )
        parts["feature_extractor"] = (
            CLIPImageProcessor()
            if extractor is None
            else folders.load_part(extractor, CLIPImageProcessor, self.dtype)
        )
        return Holding(model, "safety_checker", parts, size)

    def _make_room(self, size: int, model: Model) -> None:
        """Drops as much as so many bytes need. Raises MemoryShort."""
        while self._total_bytes() + size > self.budget_bytes:
            idle = [holding for holding in self._held.values() if not holding.users]
            if not idle:
                raise MemoryShort(
                    f"cannot load {model.name!r}: its {size / 2**30:.2f} GB and those in use "
                    f"are more than the device's {self.budget_bytes / 2**30:.2f} GB for weights"
                )
            oldest = min(idle, key=lambda holding: holding.last_used)
            self._modules.spare(oldest.parts)
            self._drop(oldest)
            self._changed()

    def _total_bytes(self) -> int:
        return sum(holding.bytes for holding in self._held.values())

    def _drop(self, holding: Holding) -> None:
        self._held = {key: held for key, held in self._held.items() if held is not holding}
        if holding.kind == "vae":
            for held in self._held.values():
                held.vae = None if held.vae == holding.model.name else held.vae
        if holding.recipe is not None:
            holding.recipe.last_used = holding.last_used
        holding.clear()


def _on_device(holding: Holding) -> Resident:
    return Resident(
        checkpoint=holding.model.name,
        path=holding.model.path,
        family=holding.model.family,
        vae=holding.vae,
        loras=list(holding.loras),
        tier="device",
        bytes=holding.bytes,
        last_used=holding.last_used,
    )


def _on_host(recipe: Recipe) -> Resident:
    return Resident(
        checkpoint=recipe.model.name,
        path=recipe.model.path,
        family=recipe.model.family,
        vae=None,
        loras=[],
        tier="host",
        bytes=recipe.bytes,
        last_used=recipe.last_used,
    )


@contextlib.contextmanager
def _said_of(kind: Kind, model: Model) -> Iterator[None]:
    """Turns whatever goes wrong while a model is read into a Refusal that names it."""
    field = FIELDS[kind]
    try:
        yield
    except (Refusal, JobCancelled, MemoryShort):
        raise
    except FileNotFoundError as error:
        detail = f"cannot load {model.name!r}: it is not there any more"
        raise Refusal("unknown_model", detail, field) from error
    except BrokenModel as error:
        detail = f"cannot load {model.name!r}: {error}"
        raise Refusal("invalid_model", detail, field) from error
    except Exception as error:
        if is_out_of_memory(error) or is_device_failure(error):
            raise
        detail = f"cannot load {model.name!r}: its files do not fit together or are broken"
        raise Refusal("invalid_model", detail, field) from error
