"""Names become checked files: the one place where a model's name turns into a path.

A name stands for a file or folder below MODEL_DIR, for what the demo ships, or for a
repository of the hub. Whatever a name tries, what is missing and what is forbidden get
the same answer. This is file work: callers run it in a thread.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ipc.messages import Family, Model
from supervisor import configs, folders
from supervisor.errors import Problem
from supervisor.families import (
    Kind,
    Traits,
    WrongKind,
    checkpoint_traits,
    file_traits,
    misfit,
    module_traits,
    spelled,
)
from supervisor.headers import InvalidModel, read_header
from supervisor.settings import Settings
from supervisor.sidecars import MAX_SIDECAR_BYTES, Sidecar, read_sidecar

FOLDERS: dict[Kind, str] = {
    "checkpoint": "checkpoints", "vae": "vae", "lora": "lora", "controlnet": "controlnet",
}  # fmt: skip
DEMO_DIR = Path(__file__).resolve().parent.parent / "gpu_worker" / "demo"
DEMO: dict[tuple[Kind, str], str] = {
    ("checkpoint", "demo"): "checkpoint",
    ("vae", "demo-paper"): "vae_paper",
    ("controlnet", "demo-edges"): "controlnet_edges",
    ("lora", "demo-outline"): "outline_lora.safetensors",
}
MAX_NAME_BYTES = 255
MAX_DEPTH = 4
MAX_REMEMBERED = 1000


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


class Hub(Protocol):
    """Where repositories come from; each call blocks until all is there, and raises Problem."""

    cache_dir: Path

    def fetch(self, kind: Kind, name: str) -> Path: ...

    def fetch_config(self, family: Family) -> Path: ...


class Models:
    """The models under MODEL_DIR. Methods block; they may be called from several threads."""

    def __init__(self, settings: Settings, hub: Hub | None = None) -> None:
        self.model_dir = settings.model_dir
        self.hub = hub
        self._remembered: dict[object, tuple[object, ResolvedModel]] = {}

    def has_demo(self) -> bool:
        """Whether the demo checkpoint is installed."""
        return _exists(DEMO["checkpoint", "demo"])

    def names(self, kind: Kind) -> list[str]:
        """Every name that `resolve` may find, sorted; the demo's first."""
        demo = [name for (k, name), place in DEMO.items() if k == kind and _exists(place)]
        top = self.model_dir / FOLDERS[kind]
        return demo + sorted(_names_below(top, self.model_dir.resolve()))

    def resolve(
        self, kind: Kind, name: str, checkpoint: ResolvedModel | None = None
    ) -> ResolvedModel:
        """Raises Problem. A single file's configuration may be that of its `checkpoint`."""
        path, root = self._locate(kind, name)
        try:
            if path.is_dir():
                return self._folder(kind, name, path, root)
            return self._file(kind, name, path, checkpoint)
        except WrongKind as error:
            raise Problem("incompatible_model", f"cannot use {name!r}: {error}") from None
        except InvalidModel as error:
            raise Problem("invalid_model", f"cannot use {name!r}: {error}") from None
        except OSError:
            raise Problem("invalid_model", f"cannot use {name!r}: it cannot be read") from None

    @staticmethod
    def check_fit(checkpoint: ResolvedModel, others: Iterable[ResolvedModel]) -> None:
        """Raises Problem naming both models and families. A checkpoint among others refines."""
        for other in others:
            reason = misfit(other.kind, checkpoint.traits, other.traits)
            if reason:
                raise Problem(
                    "incompatible_model",
                    f"cannot use the {spelled(other.kind)} {_shown(other)} with the "
                    f"checkpoint {_shown(checkpoint)}: {reason}",
                    field=FIELDS[other.kind],
                )

    def safety_checker(self, checkpoint: ResolvedModel) -> Model | bool:
        """True: the checkpoint's own. Raises Problem when there is none at all."""
        if checkpoint.has_safety_checker:
            return True
        folder = self.model_dir / "safety_checker"
        try:
            files = folders.list_files(folder, self.model_dir.resolve())
            folders.check_component(folder, "", "StableDiffusionSafetyChecker", files)
        except (InvalidModel, OSError):
            raise Problem(
                "invalid_model",
                "cannot check pictures: neither the checkpoint nor MODEL_DIR/safety_checker "
                "has a safety checker in safetensors",
                field="safety_checker",
            ) from None
        return Model(name="safety_checker", path=str(folder.resolve()))

    def _locate(self, kind: Kind, name: str) -> tuple[Path, Path]:
        """The model's path and the folder that it must not lead out of, free of links."""
        if (kind, name) in DEMO and _exists(DEMO[kind, name]):
            return DEMO_DIR / DEMO[kind, name], DEMO_DIR
        if is_safe_name(name):
            root = self.model_dir.resolve()
            path = root / FOLDERS[kind] / name
            if folders.is_inside(path, root) and (path.is_file() or _is_model(path)):
                return path.resolve(), root
            if self.hub is not None:
                return self.hub.fetch(kind, name), self.hub.cache_dir.resolve()
        raise unknown(kind)

    def _folder(self, kind: Kind, name: str, path: Path, root: Path) -> ResolvedModel:
        files = folders.list_files(path, root)
        state = tuple(sorted(files.items()))
        if (known := self._recall((kind, name), state)) is not None:
            return known
        model = Model(name=name, path=str(path))
        if kind == "checkpoint":
            found = _checkpoint_folder(model, path, files)
        else:
            found = _module_folder(kind, model, path, files)
        sidecar = _sidecar(path / "igi.json") if "igi.json" in files else Sidecar()
        return self._remember((kind, name), state, _with_sidecar(found, sidecar))

    def _file(
        self, kind: Kind, name: str, path: Path, checkpoint: ResolvedModel | None
    ) -> ResolvedModel:
        beside = [path.with_name(path.name + ".json"), path.with_suffix(".json")]
        read = [path, *(side for side in beside if side.is_file())][:2]
        state = tuple(folders.signature(file.stat()) for file in read)
        found = self._recall((kind, name), state)
        if found is None:
            bare = _single_file(kind, Model(name=name, path=str(path), single_file=True), path)
            sidecar = _sidecar(read[1]) if len(read) > 1 else Sidecar()
            found = self._remember((kind, name), state, _with_sidecar(bare, sidecar))
        return found if kind == "lora" else self._with_config(found, checkpoint)

    def _with_config(self, found: ResolvedModel, checkpoint: ResolvedModel | None) -> ResolvedModel:
        """A lone module's configuration is its checkpoint's, else the one of its family."""
        if found.kind != "checkpoint" and checkpoint is not None:
            return _with(found, config=checkpoint.model.config or checkpoint.model.path)
        family = found.model.family
        places = [self.model_dir / "configs" / family]
        try:
            configuration = configs.find(family, found.kind, places)
        except InvalidModel:
            if self.hub is None or family not in configs.PARTS:
                raise
            configuration = configs.find(
                family, found.kind, [*places, self.hub.fetch_config(family)]
            )
        return _configured(found, configuration)

    def _recall(self, key: object, state: object) -> ResolvedModel | None:
        before, known = self._remembered.get(key, (None, None))
        return known if before == state else None

    def _remember(self, key: object, state: object, found: ResolvedModel) -> ResolvedModel:
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = (state, found)
        return found


def is_safe_name(name: str) -> bool:
    """Relative, with slashes, no hidden part, nothing unprintable. Names are never decoded."""
    if not 0 < len(name) <= MAX_NAME_BYTES or not name.isprintable() or "\\" in name:
        return False
    return len(name.encode()) <= MAX_NAME_BYTES and all(
        part and not part.startswith(".") for part in name.split("/")
    )


def unknown(kind: Kind) -> Problem:
    """The one answer for what is missing and what is forbidden."""
    return Problem("unknown_model", f"there is no {spelled(kind)} of this name that may be used")


FIELDS: dict[Kind, str] = {
    "checkpoint": "refiner_model", "vae": "vae", "lora": "loras", "controlnet": "control_model",
}  # fmt: skip


def _shown(found: ResolvedModel) -> str:
    family = found.traits.family
    return f"{found.model.name!r}" + (f" (family {family})" if family else "")


def _checkpoint_folder(model: Model, path: Path, files: folders.Files) -> ResolvedModel:
    if "model_index.json" not in files and "config.json" in files:
        config = folders.read_json(path, "config.json", files)
        raise WrongKind(f"it is a {str(config.get('_class_name'))[:99]}, not a checkpoint")
    checked = folders.read_checkpoint(path, files)
    traits = checkpoint_traits(checked.model_index, checked.configs)
    return ResolvedModel(
        model=model, kind="checkpoint", traits=traits, components=checked.components
    )


def _module_folder(kind: Kind, model: Model, path: Path, files: folders.Files) -> ResolvedModel:
    if kind == "lora" or "model_index.json" in files:
        raise WrongKind(f"it is a folder of another kind of model, not a {spelled(kind)}")
    folders.check_no_code(files)
    config = folders.read_json(path, "config.json", files)
    traits = module_traits(kind, config)
    folders.check_weights(path, "", files, files)
    return ResolvedModel(model=model, kind=kind, traits=traits)


def _single_file(kind: Kind, model: Model, path: Path) -> ResolvedModel:
    header = read_header(path)
    if path.suffix != ".safetensors":
        raise InvalidModel("its name must end in .safetensors")
    traits = file_traits(kind, header.tensors, header.metadata)
    return ResolvedModel(model=model, kind=kind, traits=traits)


def _sidecar(path: Path) -> Sidecar:
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise InvalidModel(f"its sidecar {path.name} is larger than {MAX_SIDECAR_BYTES} bytes")
    return read_sidecar(path.read_bytes(), path.name)


def _with_sidecar(found: ResolvedModel, sidecar: Sidecar) -> ResolvedModel:
    """The family goes into traits and model alike; a prediction type is told only if known."""
    traits = found.traits
    if sidecar.family is not msgspec.UNSET:
        traits = msgspec.structs.replace(traits, family=sidecar.family)
    if sidecar.prediction_type is not msgspec.UNSET:
        traits = msgspec.structs.replace(traits, prediction_type=sidecar.prediction_type)
    told = found.model.single_file or sidecar.prediction_type is not msgspec.UNSET
    changed = msgspec.structs.replace(found, traits=traits, defaults=sidecar.defaults())
    return _with(
        changed,
        family=traits.family or "other",
        prediction_type=traits.prediction_type if told else None,
    )


def _configured(found: ResolvedModel, configuration: configs.Configuration) -> ResolvedModel:
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
    return _with(complete, config=str(configuration.folder))


def _with(found: ResolvedModel, **changes: Any) -> ResolvedModel:
    """The same with the worker's view of it changed."""
    return msgspec.structs.replace(found, model=msgspec.structs.replace(found.model, **changes))


def _exists(place: str) -> bool:
    return (DEMO_DIR / place).exists()


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("model_index.json", "config.json"))


def _names_below(top: Path, root: Path) -> Iterable[str]:
    """Files of weights and folders of models; a folder of models is not looked into."""
    groups = [""]
    for group in groups:
        try:
            entries = list((top / group).iterdir())
        except OSError:
            continue
        for path in entries:
            name = group + path.name
            if not is_safe_name(name) or not folders.is_inside(path, root):
                continue
            if (path.is_file() and path.suffix == ".safetensors") or _is_model(path):
                yield name
            elif path.is_dir() and group.count("/") < MAX_DEPTH:
                groups.append(name + "/")
