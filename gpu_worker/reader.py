"""Models read from folders and files: each becomes a holding of modules on the device.

Knows files, recipes and modules; asks for room before it takes any. What is held already,
and what gives way, is the library's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor

from gpu_worker import folders, single_files
from gpu_worker.failures import (
    JobCancelled,
    MemoryShort,
    Refusal,
    is_device_failure,
    is_out_of_memory,
)
from gpu_worker.folders import BrokenModel
from gpu_worker.holdings import Holding, Kind
from gpu_worker.modules import Modules, Wanted
from gpu_worker.recipes import Recipes, existing_folder, folder_bytes
from ipc.messages import Model

Nothing = Callable[[], None]

FIELDS: dict[Kind, str] = {
    "checkpoint": "checkpoint",
    "vae": "vae",
    "controlnet": "control_model",
    "safety_checker": "safety_checker",
}


class Reader:
    """Its methods raise Refusal, BrokenModel, OSError, what `make_room` raises and what a
    checkpoint's `step` does; within `said_of`, the first three become a Refusal."""

    def __init__(
        self,
        modules: Modules,
        recipes: Recipes,
        dtype: torch.dtype,
        make_room: Callable[[int, Model], None],
    ) -> None:
        self._modules = modules
        self._recipes = recipes
        self._dtype = dtype
        self._make_room = make_room

    def checkpoint(self, model: Model, step: Nothing) -> Holding:
        """`step` is called between its parts."""
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

    def module(self, model: Model, kind: Kind, upcasts: bool = False) -> Holding:
        """A VAE or a ControlNet of its own. `upcasts`: for pipelines that decode in float32."""
        if model.single_file:
            plan = single_files.module_plan(model, kind, self._recipes.weights(model))
            size = single_files.tensor_bytes(plan.weights, self._dtype)
            wanted = self._modules.of_file(plan, model, upcasts)
        else:
            root = existing_folder(model)
            size = folder_bytes(self._dtype, root)
            wanted = self._modules.of_folder(root, folders.module_class(root), upcasts)
        self._make_room(size, model)
        return Holding(model, kind, self._made({"module": wanted}, lambda: None), size)

    def safety_checker(self, model: Model) -> Holding:
        """Its module and its feature extractor."""
        root = existing_folder(model)
        size = folder_bytes(self._dtype, root)
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
            else folders.load_part(extractor, CLIPImageProcessor, self._dtype)
        )
        return Holding(model, "safety_checker", parts, size)


@contextlib.contextmanager
def said_of(kind: Kind, model: Model) -> Iterator[None]:
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
