"""Names become checked files: the one place where a model's name turns into a path.

A name stands for a file or folder below MODEL_DIR, for what the demo ships, or for a
repository of the hub. Whatever a name tries, what is missing and what is forbidden get
the same answer. This is file work: callers run it in a thread.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ipc.messages import Model
from supervisor import configs, folders, resolved
from supervisor.errors import Problem
from supervisor.families import (
    Kind,
    WrongKind,
    misfit,
    spelled,
)
from supervisor.headers import InvalidModel
from supervisor.hub import Hub, unknown
from supervisor.resolved import ResolvedModel as ResolvedModel  # callers take it from here
from supervisor.settings import Settings
from supervisor.sidecars import Sidecar

FOLDERS: dict[Kind, str] = {
    "checkpoint": "checkpoints", "vae": "vae", "lora": "lora", "controlnet": "controlnet",
}  # fmt: skip
FIELDS: dict[Kind, str] = {
    "checkpoint": "checkpoint", "vae": "vae", "lora": "loras", "controlnet": "control_model",
}  # fmt: skip
"""Where a request names each kind."""
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
FRESH_SECONDS = 30.0
"""How long what was found of a model's files is taken as it was."""

T = TypeVar("T")


class NotAtHand(Exception):
    """Files would have to be looked at."""


class Models:
    """The models under MODEL_DIR. Methods block; they may be called from several threads."""

    def __init__(
        self,
        settings: Settings,
        hub: Hub | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model_dir = settings.model_dir
        self._config_dir = settings.config_dir
        self.hub = hub
        self._now = clock
        self._may_look = True
        self._remembered: dict[object, tuple[object, ResolvedModel]] = {}
        self._looked_at: dict[object, tuple[float, ResolvedModel]] = {}

    def at_hand(self) -> "Models":
        """The same models for callers that must not block: what nobody has looked at within
        FRESH_SECONDS raises NotAtHand."""
        twin = copy.copy(self)
        twin._may_look = False
        return twin

    def _look(self) -> None:
        if not self._may_look:
            raise NotAtHand

    def has_demo(self) -> bool:
        """Whether the demo checkpoint is installed."""
        self._look()
        return _exists(DEMO["checkpoint", "demo"])

    def names(self, kind: Kind) -> list[str]:
        """Every name that `resolve` may find, sorted; the demo's first."""
        self._look()
        demo = [name for (k, name), place in DEMO.items() if k == kind and _exists(place)]
        top = self.model_dir / FOLDERS[kind]
        return demo + sorted(_names_below(top, self.model_dir.resolve()))

    def resolve(
        self,
        kind: Kind,
        name: str,
        checkpoint: ResolvedModel | None = None,
        field: str | None = None,
    ) -> ResolvedModel:
        """A single file's configuration may be that of its `checkpoint`.

        What was looked at within FRESH_SECONDS is not looked at again: that takes a hundred system
        calls a request. Raises Problem for `field`, which is the request's usual one for
        this kind.
        """
        key = (kind, name, None if checkpoint is None else checkpoint.model)
        now = self._now()
        at, known = self._looked_at.get(key, (-math.inf, None))
        if known is not None and now - at < FRESH_SECONDS:
            return known
        try:
            found = self._resolved(kind, name, checkpoint)
            _keep(self._looked_at, key, (now, found))
            return found
        except WrongKind as error:
            problem = Problem("incompatible_model", f"cannot use {name!r}: {error}")
        except InvalidModel as error:
            problem = Problem("invalid_model", f"cannot use {name!r}: {error}")
        except OSError:
            problem = Problem("invalid_model", f"cannot use {name!r}: it cannot be read")
        except Problem as known:
            problem = known
        problem.field = field or FIELDS[kind]
        raise problem from None

    def _resolved(self, kind: Kind, name: str, checkpoint: ResolvedModel | None) -> ResolvedModel:
        self._look()
        path, root = self._locate(kind, name)
        if path.is_dir():
            return self._folder(kind, name, path, root)
        return self._file(kind, name, path, checkpoint)

    @staticmethod
    def check_fit(checkpoint: ResolvedModel, others: Iterable[ResolvedModel]) -> None:
        """Raises Problem naming both models and families. A checkpoint among others refines."""
        for other in others:
            reason = misfit(other.kind, checkpoint.traits, other.traits)
            if reason:
                raise Problem(
                    "incompatible_model",
                    f"cannot use the {spelled(other.kind)} {resolved.shown(other)} with the "
                    f"checkpoint {resolved.shown(checkpoint)}: {reason}",
                    field="refiner_model" if other.kind == "checkpoint" else FIELDS[other.kind],
                )

    def safety_checker(self, checkpoint: ResolvedModel) -> Model | bool:
        """True: the checkpoint's own. Raises Problem when there is none at all."""
        if checkpoint.has_safety_checker:
            return True
        self._look()
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
            group = root / FOLDERS[kind] / name.split("/")[0]
            if self.hub is not None and not os.path.lexists(group):
                return self.hub.fetch(kind, name), self.hub.cache_dir.resolve()
        raise unknown(kind)

    def _folder(self, kind: Kind, name: str, path: Path, root: Path) -> ResolvedModel:
        files = folders.list_files(path, root)
        state = tuple(sorted(files.items()))
        if (known := self._recall((kind, name), state)) is not None:
            return known
        model = Model(name=name, path=str(path))
        if kind == "checkpoint":
            found = resolved.checkpoint_folder(model, path, files)
        else:
            found = resolved.module_folder(kind, model, path, files)
        sidecar = resolved.sidecar_at(path / "igi.json") if "igi.json" in files else Sidecar()
        return self._remember((kind, name), state, resolved.with_sidecar(found, sidecar))

    def _file(
        self, kind: Kind, name: str, path: Path, checkpoint: ResolvedModel | None
    ) -> ResolvedModel:
        beside = [path.with_name(path.name + ".json"), path.with_suffix(".json")]
        read = [path, *(side for side in beside if side.is_file())][:2]
        state = tuple(folders.signature(file.stat()) for file in read)
        found = self._recall((kind, name), state)
        if found is None:
            bare = resolved.single_file(
                kind, Model(name=name, path=str(path), single_file=True), path
            )
            sidecar = resolved.sidecar_at(read[1]) if len(read) > 1 else Sidecar()
            found = self._remember((kind, name), state, resolved.with_sidecar(bare, sidecar))
        return found if kind == "lora" else self._with_config(found, checkpoint)

    def _with_config(self, found: ResolvedModel, checkpoint: ResolvedModel | None) -> ResolvedModel:
        """A lone module's configuration is its checkpoint's, else the one of its family."""
        if found.kind != "checkpoint" and checkpoint is not None:
            return resolved.told(found, config=checkpoint.model.config or checkpoint.model.path)
        family = found.model.family
        places = [(self.model_dir / "configs" / family, self.model_dir)]
        if self._config_dir is not None:
            places.append((self._config_dir / family, self._config_dir))
        try:
            configuration = configs.find(family, found.kind, places)
        except InvalidModel as missing:
            if self.hub is None or family not in configs.PARTS:
                raise
            try:
                places.append((self.hub.fetch_config(family), self.hub.cache_dir))
            except (Problem, InvalidModel):
                raise missing from None
            configuration = configs.find(family, found.kind, places)
        return resolved.configured(found, configuration)

    def _recall(self, key: object, state: object) -> ResolvedModel | None:
        before, known = self._remembered.get(key, (None, None))
        return known if before == state else None

    def _remember(self, key: object, state: object, found: ResolvedModel) -> ResolvedModel:
        _keep(self._remembered, key, (state, found))
        return found


def _keep(known: dict[object, T], key: object, value: T) -> None:
    if len(known) >= MAX_REMEMBERED:
        known.clear()
    known[key] = value


def is_safe_name(name: str) -> bool:
    """Relative, with slashes, no hidden part, nothing unprintable. Names are never decoded."""
    if not 0 < len(name) <= MAX_NAME_BYTES or not name.isprintable() or "\\" in name:
        return False
    return len(name.encode()) <= MAX_NAME_BYTES and all(
        part and not part.startswith(".") for part in name.split("/")
    )


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
