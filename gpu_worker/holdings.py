"""A model in a worker's memory, and how it is shown to the supervisor."""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from gpu_worker.adapters import AdapterState
from gpu_worker.recipes import Recipe
from ipc.messages import Model, Resident

Kind = Literal["checkpoint", "vae", "controlnet", "safety_checker"]

ADAPTED = ("unet", "text_encoder", "text_encoder_2")


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


def on_device(holding: Holding) -> Resident:
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


def on_host(recipe: Recipe) -> Resident:
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
