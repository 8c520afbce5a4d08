"""Which of a hub repository's files a model needs: configurations, one set of safetensors.

Pure: the repository's names are arguments. InvalidModel is raised before any weights
are fetched.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from supervisor import folders
from supervisor.headers import InvalidModel

SMALL = (".json", ".txt", ".model")
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(?P<half>\.fp16)?(?P<shard>-\d+-of-\d+)?\.safetensors"
)
LORA_NAME = "pytorch_lora_weights.safetensors"


def checkpoint_files(
    names: set[str], read: Callable[[str], dict[str, Any]], half: bool
) -> list[str]:
    """What a pipeline needs. Raises InvalidModel before any weights are fetched."""
    if "model_index.json" not in names:
        raise InvalidModel("its repository is no Diffusers pipeline: it lacks model_index.json")
    files = ["model_index.json"]
    for name, class_name in folders.components(read("model_index.json")).items():
        found = component_files(f"{name}/", names, half)
        weightless = class_name.endswith(
            ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor")
        )
        if weightless or any(file.endswith(".safetensors") for file in found):
            files += found
        elif name not in folders.OPTIONAL:
            raise InvalidModel(f"its repository has no safetensors weights for {name}")
    return files


def module_files(names: set[str], half: bool) -> list[str]:
    """A VAE's or ControlNet's repository: one component at its root."""
    found = component_files("", names, half)
    if "config.json" not in found or not any(file.endswith(".safetensors") for file in found):
        raise InvalidModel("its repository lacks config.json or safetensors weights")
    return found


def lora_files(names: set[str]) -> list[str]:
    weights = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if LORA_NAME in weights:
        return [LORA_NAME]
    if len(weights) != 1:
        raise InvalidModel(f"its repository has {len(weights)} safetensors files, not one")
    return weights


def config_files(names: Iterable[str]) -> list[str]:
    """The small files of a pipeline: of its root the index alone, of its parts all."""
    parts = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet",
             "vae")  # fmt: skip
    return sorted(
        name
        for name in names
        if name == "model_index.json"
        or (name.endswith(SMALL) and name.split("/")[0] in parts and name.count("/") == 1)
    )


def component_files(prefix: str, names: Iterable[str], half: bool) -> list[str]:
    """Configurations and one set of weights: whole before sharded, fp16 where wanted or alone."""
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    small = {
        name
        for name in inside
        if name.endswith(SMALL) and "/" not in name and ".index." not in name
    }
    found = [match for name in sorted(inside) if (match := WEIGHTS.fullmatch(name))]
    in_half = [match for match in found if match["half"]]
    in_full = [match for match in found if not match["half"]]
    chosen = in_half if in_half and (half or not in_full) else in_full
    whole = [match for match in chosen if not match["shard"]][:1]
    weights = [match[0] for match in whole or chosen]
    indexes = {name for name in inside if ".safetensors.index" in name} if not whole else set()
    indexes = {name for name in indexes if (".fp16." in name) == (chosen is in_half)}
    return [prefix + name for name in [*sorted(small | indexes), *weights]]
