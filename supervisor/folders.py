"""Folders in Diffusers' layout: their files listed, and checked before anything loads them.

Only JSON and safetensors headers are read. A folder is refused when it holds code, asks
for a class outside Diffusers and Transformers, or lacks a file without which a pipeline
would fail or, worse, draw a wrong picture.
"""

import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from supervisor.headers import InvalidModel, read_header

MAX_FILES = 1000
MAX_JSON_BYTES = 4 * 2**20
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")

Signature = tuple[int, int, int, int]
"""Device, inode, size and time of change: the same signature, the same content."""
Files = Mapping[str, Signature]
"""A folder's files by their paths below it, with slashes."""


class Checkpoint(NamedTuple):
    """A checked folder: its index, its components' classes and configurations."""

    model_index: dict[str, Any]
    components: dict[str, str]
    configs: dict[str, dict[str, Any]]


def signature(status: os.stat_result) -> Signature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_inside(path: Path, root: Path) -> bool:
    """Whether the path, all links followed, is below `root`, itself free of links."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def list_files(folder: Path, root: Path) -> dict[str, Signature]:
    """Files two levels deep, hidden ones left out. Raises InvalidModel for a link out of root."""
    found: dict[str, Signature] = {}
    folders = [""]
    for prefix in folders:
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not is_inside(Path(entry.path), root):
                    raise InvalidModel("it holds a link that leads nowhere or out of its place")
                if not entry.is_dir():
                    found[prefix + entry.name] = signature(entry.stat())
                elif prefix.count("/") < 2:
                    folders.append(f"{prefix}{entry.name}/")
        if len(found) > MAX_FILES:
            raise InvalidModel(f"it holds more than {MAX_FILES} files")
    return found


def read_checkpoint(folder: Path, files: Files) -> Checkpoint:
    """Raises InvalidModel naming the file or component that is missing or forbidden."""
    check_no_code(files)
    index = read_json(folder, "model_index.json", files)
    if not is_class_name(index.get("_class_name")):
        raise InvalidModel("model_index.json does not name a pipeline class of Diffusers")
    asked = components(index)
    present = {
        name: class_name
        for name, class_name in asked.items()
        if name not in OPTIONAL or _is_whole(folder, name, class_name, files)
    }
    configs = {
        name: config
        for name, class_name in present.items()
        if (config := check_component(folder, f"{name}/", class_name, files)) is not None
    }
    return Checkpoint(index, present, configs)


def check_no_code(files: Files) -> None:
    code = next((name for name in files if name.endswith((".py", ".pyc", ".so"))), None)
    if code:
        raise InvalidModel(f"it holds code, which is never run: {code}")


def components(index: Mapping[str, Any]) -> dict[str, str]:
    """The classes that a model_index.json asks for, by component."""
    found: dict[str, str] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        library, class_name = value if len(value) == 2 else (None, None)
        known = isinstance(library, str) and library in libraries() and is_class_name(class_name)
        if not (known and re.fullmatch(r"\w{1,64}", name, re.ASCII)):
            raise InvalidModel(
                f"model_index.json asks for a class outside Diffusers and Transformers: {name[:64]}"
            )
        found[name] = str(class_name)
    return found


@functools.cache
def libraries() -> frozenset[str]:
    """What a component's class may come from; Diffusers names its pipelines' modules too."""
    spec = importlib.util.find_spec("diffusers")  # finds it without importing it
    places = spec.submodule_search_locations if spec else None
    pipelines = [path.name for place in places or [] for path in Path(place, "pipelines").iterdir()]
    plain = {name for name in pipelines if not name.startswith("_") and "." not in name}
    return frozenset({"diffusers", "transformers"} | plain)


def is_class_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Z]\w{0,99}", value, re.ASCII) is not None


def _is_whole(folder: Path, name: str, class_name: str, files: Files) -> bool:
    try:
        check_component(folder, f"{name}/", class_name, files)
    except InvalidModel:
        return False
    return True


def check_component(
    folder: Path, prefix: str, class_name: str, files: Files
) -> dict[str, Any] | None:
    """One component's files; returns the configuration of a scheduler or a model."""
    names = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
    if "Tokenizer" in class_name:
        missing = missing_tokenizer_files(class_name, names)
        if missing:
            raise InvalidModel("it lacks " + ", ".join(prefix + name for name in missing))
        read_json(folder, prefix + "tokenizer_config.json", files)
        return None
    if "Processor" in class_name or class_name.endswith("FeatureExtractor"):
        read_json(folder, prefix + "preprocessor_config.json", files)
        return None
    if class_name.endswith("Scheduler"):
        return read_json(folder, prefix + "scheduler_config.json", files)
    config = read_json(folder, prefix + "config.json", files)
    check_weights(folder, prefix, names, files)
    return config


def missing_tokenizer_files(class_name: str, names: Iterable[str]) -> list[str]:
    """Without these a tokenizer may load all the same and give wrong tokens."""
    names = set(names)
    needed = ["tokenizer_config.json"]
    if "tokenizer.json" not in names:
        if class_name.startswith(("CLIP", "GPT2", "Qwen2", "Roberta")):
            needed += ["vocab.json", "merges.txt"]
        elif not any(name.endswith(".model") for name in names):
            needed += ["tokenizer.json"]
    return [name for name in needed if name not in names]


def check_weights(folder: Path, prefix: str, names: Iterable[str], files: Files) -> None:
    names = set(names)
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        pickled = any(name.endswith(PICKLES) for name in names)
        raise InvalidModel(
            f"{prefix or 'its folder'} has no safetensors weights"
            + (", and pickles are never opened" if pickled else "")
        )
    for name in weights:
        try:
            read_header(folder / (prefix + name))
        except InvalidModel as error:
            raise InvalidModel(f"{prefix}{name}: {error}") from None
    for name in names:
        if re.search(r"\.safetensors\.index\.([a-z0-9]+\.)?json$", name):
            _check_shards(read_json(folder, prefix + name, files), prefix, names)


def _check_shards(index: Mapping[str, Any], prefix: str, names: set[str]) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise InvalidModel(f"{prefix} has an index of shards without a weight_map")
    missing = set(map(str, shards.values())) - names
    if missing:
        raise InvalidModel(f"{prefix} lacks {len(missing)} of its shards of weights")


def read_json(folder: Path, name: str, files: Files) -> dict[str, Any]:
    """A JSON object. Raises InvalidModel naming the file, also when it asks for remote code."""
    if name not in files:
        raise InvalidModel(f"it lacks {name}")
    if files[name][2] > MAX_JSON_BYTES:
        raise InvalidModel(f"{name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        raise InvalidModel(f"{name} is not readable JSON") from None
    if not isinstance(value, dict):
        raise InvalidModel(f"{name} is not a JSON object")
    if "auto_map" in value or "custom_pipelines" in value:
        raise InvalidModel(f"{name} asks for code of its own, which is never run")
    return value
