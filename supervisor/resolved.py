"""A model after its checks: what is read from its files, its sidecar, its configuration."""

from pathlib import Path
from typing import Any

import msgspec

from ipc.messages import Model
from supervisor import configs, folders
from supervisor.families import (
    Kind,
    Traits,
    WrongKind,
    checkpoint_traits,
    module_traits,
    spelled,
)
from supervisor.file_families import file_traits
from supervisor.headers import InvalidModel, read_header
from supervisor.sidecars import MAX_SIDECAR_BYTES, Sidecar, read_sidecar


class ResolvedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A checked model: what a worker is told, and what the supervisor decides by."""

    model: Model
    kind: Kind
    traits: Traits
    defaults: dict[str, Any] = {}
    """Default parameters from the sidecar, `scheduler` and `a1111_scheduler` among them."""
    components: dict[str, str] = {}
    """A checkpoint's components and their classes; the pipeline's is `traits.class_name`."""

    @property
    def class_name(self) -> str | None:
        """A checkpoint's pipeline class, another module's own."""
        return self.traits.class_name

    @property
    def scheduler(self) -> str | None:
        """The scheduler's class unless a caller says otherwise: the sidecar's, else its own."""
        told = self.defaults.get("scheduler")
        return told if isinstance(told, str) else self.components.get("scheduler")

    @property
    def has_safety_checker(self) -> bool:
        return {"safety_checker", "feature_extractor"} <= self.components.keys()


def shown(found: ResolvedModel) -> str:
    """The name and the family, for sentences."""
    family = found.traits.family
    return f"{found.model.name!r}" + (f" (family {family})" if family else "")


def checkpoint_folder(model: Model, path: Path, files: folders.Files) -> ResolvedModel:
    """A Diffusers pipeline's folder. Raises InvalidModel, WrongKind."""
    if "model_index.json" not in files and "config.json" in files:
        config = folders.read_json(path, "config.json", files)
        raise WrongKind(f"it is a {str(config.get('_class_name'))[:99]}, not a checkpoint")
    checked = folders.read_checkpoint(path, files)
    traits = checkpoint_traits(checked.model_index, checked.configs)
    return ResolvedModel(
        model=model, kind="checkpoint", traits=traits, components=checked.components
    )


def module_folder(kind: Kind, model: Model, path: Path, files: folders.Files) -> ResolvedModel:
    """A VAE's or ControlNet's folder. Raises InvalidModel, WrongKind."""
    if kind == "lora" or "model_index.json" in files:
        raise WrongKind(f"it is a folder of another kind of model, not a {spelled(kind)}")
    folders.check_no_code(files)
    config = folders.read_json(path, "config.json", files)
    traits = module_traits(kind, config)
    folders.check_weights(path, "", files, files)
    return ResolvedModel(model=model, kind=kind, traits=traits)


def single_file(kind: Kind, model: Model, path: Path) -> ResolvedModel:
    """A file of weights, as far as its header tells. Raises InvalidModel, WrongKind."""
    header = read_header(path)
    if path.suffix != ".safetensors":
        raise InvalidModel("its name must end in .safetensors")
    traits = file_traits(kind, header.tensors, header.metadata)
    return ResolvedModel(model=model, kind=kind, traits=traits)


def sidecar_at(path: Path) -> Sidecar:
    """Raises InvalidModel."""
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise InvalidModel(f"its sidecar {path.name} is larger than {MAX_SIDECAR_BYTES} bytes")
    return read_sidecar(path.read_bytes(), path.name)


def with_sidecar(found: ResolvedModel, sidecar: Sidecar) -> ResolvedModel:
    """The family goes into traits and model alike; a prediction type is told only if known."""
    traits = found.traits
    if sidecar.family is not msgspec.UNSET:
        traits = msgspec.structs.replace(traits, family=sidecar.family)
    if sidecar.prediction_type is not msgspec.UNSET:
        traits = msgspec.structs.replace(traits, prediction_type=sidecar.prediction_type)
    is_known = found.model.single_file or sidecar.prediction_type is not msgspec.UNSET
    changed = msgspec.structs.replace(found, traits=traits, defaults=sidecar.defaults())
    return told(
        changed,
        family=traits.family or "other",
        prediction_type=traits.prediction_type if is_known else None,
    )


def configured(found: ResolvedModel, configuration: configs.Configuration) -> ResolvedModel:
    """A single file with what its configuration tells: classes, and the latents' scale."""
    there, here = configuration.traits, found.traits
    widths = {there.cross_attention_dim, here.cross_attention_dim} - {None}
    if len(widths) > 1:
        raise InvalidModel(f"its widths are not those of configs/{found.model.family}")
    traits = msgspec.structs.replace(
        here,
        class_name=here.class_name or there.class_name,
        scaling_factor=there.scaling_factor if found.kind != "controlnet" else None,
        prediction_type=here.prediction_type or there.prediction_type,
    )
    components = configuration.components if found.kind == "checkpoint" else {}
    complete = msgspec.structs.replace(found, traits=traits, components=components)
    return told(complete, config=str(configuration.folder))


def told(found: ResolvedModel, **changes: Any) -> ResolvedModel:
    """The same with the worker's view of it changed."""
    return msgspec.structs.replace(found, model=msgspec.structs.replace(found.model, **changes))
