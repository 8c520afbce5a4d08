"""Model folders on disk: what a checkpoint's folder lists, and how each part is loaded.

Weights are safetensors and nothing else; classes come from Diffusers and
Transformers by name, and no code in a folder is ever run.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open

PIPELINE_INDEX = "model_index.json"
LOADED_ON_REQUEST = frozenset({"safety_checker"})
# Names in old checkpoints, and what Transformers calls them now.
RENAMED = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "T5TokenizerFast": "T5Tokenizer",
}
PARTS_OF_TRANSFORMERS = (
    transformers.PreTrainedModel,
    transformers.PreTrainedTokenizerBase,
    transformers.FeatureExtractionMixin,
    transformers.ImageProcessingMixin,
    transformers.ProcessorMixin,
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


class BrokenModel(Exception):
    """A folder that cannot be used; what is said names parts of it, never its path."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises BrokenModel where there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BrokenModel(f"it has no {path.name}") from None
    except (OSError, ValueError, RecursionError):
        raise BrokenModel(f"its {path.name} cannot be read") from None
    if not isinstance(content, dict):
        raise BrokenModel(f"its {path.name} holds no object")
    return content


def parts(index: dict[str, Any]) -> dict[str, tuple[str, str] | None]:
    """A pipeline index's parts: library and class by name; None where it says there is none."""
    found: dict[str, tuple[str, str] | None] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and not name.startswith("_"):
            library, class_name = value
            found[name] = None if class_name is None else (str(library), str(class_name))
    return found


def scalars(index: dict[str, Any]) -> dict[str, Any]:
    """A pipeline index's settings, such as force_zeros_for_empty_prompt."""
    names = parts(index)
    return {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and name not in names
    }


def part_class(library: str, class_name: str) -> type[Any]:
    """The class of a part. Raises BrokenModel for what is not of the two libraries."""
    name = RENAMED.get(class_name, class_name) if library == "transformers" else class_name
    kind = getattr(_module(library), name, None)
    allowed = (ConfigMixin, *PARTS_OF_TRANSFORMERS)
    if (
        isinstance(kind, type)
        and issubclass(kind, allowed)
        and not issubclass(kind, DiffusionPipeline)
    ):
        return kind
    raise BrokenModel(f"it lists {class_name!r} of {library!r}, which cannot be loaded")


def _module(library: str) -> Any:
    if library in ("diffusers", "transformers"):
        return importlib.import_module(library)
    if library.isidentifier():  # a part that is kept beside its pipeline
        try:
            return importlib.import_module(f"diffusers.pipelines.{library}")
        except ImportError:
            return None
    return None


def load_part(folder: Path, kind: type[Any], dtype: torch.dtype) -> Any:
    """Loads one part from its folder: in `dtype`, on the CPU, in evaluation mode.

    Raises BrokenModel where files are missing, are not safetensors or do not fit.
    """
    if not folder.is_dir():
        raise BrokenModel(f"its part {folder.name!r} is missing")
    tokenizes = issubclass(kind, transformers.PreTrainedTokenizerBase)
    if tokenizes and not any((folder / name).is_file() for name in VOCABULARIES):
        raise BrokenModel(f"its part {folder.name!r} has no vocabulary")
    if not issubclass(kind, (ModelMixin, transformers.PreTrainedModel)):
        return kind.from_pretrained(str(folder), local_files_only=True)
    model, report = kind.from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        variant=variant(folder, dtype),
        output_loading_info=True,
        **{"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype},
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise BrokenModel(
            f"its part {folder.name!r} lacks {missing[0]} and {len(missing) - 1} more"
        )
    return model.eval()


def module_class(folder: Path) -> type[Any]:
    """Of a model that stands alone, such as a VAE or a ControlNet: its config.json names it."""
    class_name = str(read_json(folder / "config.json").get("_class_name"))
    kind = part_class("diffusers", class_name)
    if not issubclass(kind, ModelMixin):
        raise BrokenModel(f"its config.json names {class_name!r}, which is no model")
    return kind


def load_module(folder: Path, dtype: torch.dtype) -> Any:
    """A model that stands alone. Raises BrokenModel."""
    return load_part(folder, module_class(folder), dtype)


def variant(folder: Path, dtype: torch.dtype) -> str | None:
    """Which of a folder's sets of weights to load: fp16 where it suits or nothing else is there.

    Raises BrokenModel where there are no safetensors.
    """
    names = [file.name for file in folder.iterdir()]
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise BrokenModel(f"its part {folder.name!r} has no safetensors")
    half = any(".fp16" in name for name in weights)
    full = any(".fp16" not in name and ".non_ema" not in name for name in weights)
    return "fp16" if half and (dtype == torch.float16 or not full) else None


def weights(folder: Path, dtype: torch.dtype) -> list[Path]:
    """The safetensors files that load_part would read; an empty list where there are none."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return []
    half = variant(folder, dtype) == "fp16"
    return [
        file for file in files if (".fp16" in file.name) == half and ".non_ema" not in file.name
    ]


def weights_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes that a folder's weights take in memory, from their headers alone.

    Raises BrokenModel for a file that is cut short or is not safetensors.
    """
    return sum(_file_bytes(file, dtype) for file in weights(folder, dtype))


def _file_bytes(file: Path, dtype: torch.dtype) -> int:
    try:
        with safe_open(str(file), "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except (SafetensorError, OSError):
        raise BrokenModel(f"{file.parent.name}/{file.name} is not whole safetensors") from None
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def refuse_other_weights(folder: Path) -> None:
    """Raises BrokenModel where an index of shards names files that are not safetensors."""
    for index in folder.glob("*.safetensors.index*.json"):
        shards = read_json(index).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [None]
        if not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise BrokenModel(f"{folder.name}/{index.name} names what is not safetensors")


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name
