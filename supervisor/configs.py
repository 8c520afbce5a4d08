"""The small files that a single-file model lacks: configurations and tokenizers by family.

They come from MODEL_DIR/configs/{family} or, fetched once, from the hub. Each must be
there before anything is loaded: Diffusers draws wrong pictures without saying so when
a tokenizer's files are missing.
"""

from pathlib import Path
from typing import Any

from ipc.messages import Family
from supervisor import folders
from supervisor.families import Kind, Traits, checkpoint_traits, spelled
from supervisor.folders import Files
from supervisor.headers import InvalidModel

COMMON = {"scheduler": "Scheduler", "unet": "UNet", "vae": "VAE"}
FIRST = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
SECOND = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
PARTS: dict[Family, dict[str, str]] = {
    "sd15": COMMON | FIRST,
    "sd21": COMMON | FIRST,
    "sdxl": COMMON | FIRST | SECOND,
    "sdxl_refiner": COMMON | SECOND,
}
NEEDED_PART: dict[Kind, str] = {"vae": "vae", "controlnet": "unet"}
"""What a lone module needs of its family: a ControlNet's shape follows from the UNet's."""


class Configuration:
    """A family's folder that was found complete for a kind of model."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self.model_index: dict[str, Any] = {}
        if "model_index.json" in files:
            self.model_index = folders.read_json(folder, "model_index.json", files)
        self.components = folders.components(self.model_index)
        for optional in folders.OPTIONAL:
            self.components.pop(optional, None)  # a single file does not hold these
        places = {name: f"{name}/{_config_name(name)}" for name in COMMON | FIRST | SECOND}
        self.configs = {
            name: folders.read_json(folder, place, files)
            for name, place in places.items()
            if place in files
        }

    @property
    def traits(self) -> Traits:
        return checkpoint_traits(self.model_index, self.configs)


def find(family: Family, kind: Kind, places: list[tuple[Path, Path]]) -> Configuration:
    """The first complete folder. Raises InvalidModel naming every file missing from the first.

    Each place comes with the folder that its links must not lead out of.
    """
    if family not in PARTS:
        raise InvalidModel(
            "a single file must be of a known family (sd15, sd21, sdxl, sdxl_refiner); "
            "others are served as Diffusers folders"
        )
    lacking: list[list[str]] = []
    for place, root in places:
        files = _files(place, root)
        missing = missing_files(family, kind, files)
        if not missing:
            return Configuration(place, files)
        lacking.append(missing)
    shown = ", ".join(f"configs/{family}/{name}" for name in lacking[0])
    raise InvalidModel(f"a single-file {spelled(kind)} needs these files in MODEL_DIR: {shown}")


def missing_files(family: Family, kind: Kind, files: Files) -> list[str]:
    """Every file that a single-file model of this family needs and that is not there."""
    parts = PARTS[family]
    if kind in NEEDED_PART:
        parts = {name: parts[name] for name in [NEEDED_PART[kind]]}
    missing = [] if kind in NEEDED_PART or "model_index.json" in files else ["model_index.json"]
    for name, class_name in parts.items():
        names = {file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/")}
        if "Tokenizer" in class_name:
            lacking = folders.missing_tokenizer_files(class_name, names)
        else:
            lacking = [file for file in [_config_name(name)] if file not in names]
        missing += [f"{name}/{file}" for file in lacking]
    return missing


def _config_name(part: str) -> str:
    if part.startswith("tokenizer"):
        return "tokenizer_config.json"
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _files(place: Path, root: Path) -> Files:
    try:
        return folders.list_files(place, root.resolve())
    except OSError:
        return {}
