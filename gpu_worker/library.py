"""The models that this worker holds: loaded once, shared by jobs, dropped when room is needed.

Knows paths, bytes and who uses what; knows no requests. One thread uses it.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Hashable, Iterator

import torch

from gpu_worker import adapters
from gpu_worker.failures import MemoryShort, Refusal
from gpu_worker.holdings import Holding, Kind, on_device, on_host
from gpu_worker.host_tier import HostTier
from gpu_worker.lora_files import Lora, LoraFiles
from gpu_worker.modules import Modules
from gpu_worker.reader import Nothing, Reader, said_of
from gpu_worker.recipes import Recipes
from ipc.messages import Model, Resident

HOST_BYTES = 16 * 2**30


class Library:
    """Holds models on one device within `budget_bytes`; `changed` is called when that changes."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        budget_bytes: int,
        changed: Nothing,
        host_bytes: int = HOST_BYTES,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.budget_bytes = budget_bytes
        self._changed = changed
        self._loras = LoraFiles()
        host = HostTier(device, host_bytes)
        self._modules = Modules(device, dtype, host, memory_format)
        self._recipes = Recipes(self._modules, host, dtype, device)
        self._reader = Reader(self._modules, self._recipes, dtype, self._make_room)
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
        return self._get("checkpoint", model, lambda: self._reader.checkpoint(model, step))

    def vae(self, model: Model, upcasts: bool) -> Holding:
        """A VAE of its own; `upcasts`: it is for pipelines that decode in float32."""
        return self._get("vae", model, lambda: self._reader.module(model, "vae", upcasts), upcasts)

    def controlnet(self, model: Model) -> Holding:
        return self._get("controlnet", model, lambda: self._reader.module(model, "controlnet"))

    def safety_checker(self, model: Model) -> Holding:
        """Its `module` and its `feature_extractor`."""
        return self._get("safety_checker", model, lambda: self._reader.safety_checker(model))

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
        return [on_device(holding) for holding in there] + [
            on_host(recipe) for recipe in beside if recipe.model.path not in paths
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
            with said_of(kind, model):
                holding = read()
            self._held[key] = holding
            self._changed()
        holding = self._held[key]
        holding.last_used = time.time()
        if holding.model != model:  # asked for by another of its names
            holding.model = model
            self._changed()
        return holding

    def _make_room(self, size: int, model: Model) -> None:
        """Drops as much as so many bytes need. Raises MemoryShort."""
        while self._budgeted_bytes() + size > self.budget_bytes:
            idle = [holding for holding in self._held.values() if not holding.users]
            if not idle or size > self.budget_bytes:
                self._modules.reserve(())  # what was dropped for it has nobody to go to
                raise MemoryShort(
                    f"cannot load {model.name!r}: its {size / 2**30:.2f} GB and those in use "
                    f"are more than the device's {self.budget_bytes / 2**30:.2f} GB for weights",
                    self._budgeted_bytes() + size - self.budget_bytes,
                )
            oldest = min(idle, key=lambda holding: holding.last_used)
            self._modules.spare(oldest.parts)
            self._drop(oldest)
            self._changed()

    def in_the_way(self, size: int, needed: Collection[str]) -> tuple[str, ...]:
        """The paths of as many checkpoints in use as have so many bytes, those with the fewest
        pictures first, the needed ones aside; none where all of them have less."""
        paths, left = [], size
        used = [held for held in self._held.values() if held.kind == "checkpoint" and held.users]
        for holding in sorted(used, key=lambda each: each.users):
            if left > 0 and holding.model.path not in needed:
                paths.append(holding.model.path)
                left -= holding.bytes
        return () if left > 0 else tuple(paths)

    def held_bytes(self) -> int:
        """Of all modules' tensors: their types may be wider than their files are counted by."""
        modules = [part for holding in self._held.values() for part in holding.parts.values()
                   if isinstance(part, torch.nn.Module)]  # fmt: skip
        tensors = [each for module in modules for each in (*module.parameters(), *module.buffers())]
        return sum({each.data_ptr(): each.nbytes for each in tensors}.values())

    def _budgeted_bytes(self) -> int:
        return sum(holding.bytes for holding in self._held.values())

    def _drop(self, holding: Holding) -> None:
        self._held = {key: held for key, held in self._held.items() if held is not holding}
        if holding.kind == "vae":
            for held in self._held.values():
                held.vae = None if held.vae == holding.model.name else held.vae
        if holding.recipe is not None:
            holding.recipe.last_used = holding.last_used
        holding.clear()
