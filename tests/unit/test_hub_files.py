"""Which files of a repository are asked for."""

from typing import Any

import pytest

from supervisor.headers import InvalidModel
from supervisor.hub_files import (
    checkpoint_files,
    component_files,
    config_files,
    lora_files,
    module_files,
)
from tests.tools import weights


def index(name: str) -> dict[str, Any]:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    extractor = ["transformers", "CLIPImageProcessor"]
    return weights.model_index("sd15") | {"safety_checker": checker, "feature_extractor": extractor}


NAMES = set(weights.checkpoint_files("sd15")) | {
    "safety_checker/config.json",
    "safety_checker/pytorch_model.bin",
    "feature_extractor/preprocessor_config.json",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "text_encoder/flax_model.msgpack",
    "README.md",
    "sample.json",
}


def test_a_pipeline_takes_its_components_and_nothing_else() -> None:
    wanted = set(weights.checkpoint_files("sd15")) | {"feature_extractor/preprocessor_config.json"}
    assert set(checkpoint_files(NAMES, index, half=False)) == wanted


def test_a_safety_checker_comes_along_when_it_is_in_safetensors() -> None:
    names = NAMES | {"safety_checker/model.safetensors"}
    assert "safety_checker/model.safetensors" in checkpoint_files(names, index, half=False)


def test_a_repository_without_an_index_is_no_pipeline() -> None:
    with pytest.raises(InvalidModel, match="model_index"):
        checkpoint_files({"model.safetensors"}, index, half=False)


FULL, HALF = "model.safetensors", "model.fp16.safetensors"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HALF_SHARD = "model.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("names", "half", "wanted"),
    [
        ([FULL, HALF], False, [FULL]),
        ([FULL, HALF], True, [HALF]),
        ([FULL], True, [FULL]),
        ([HALF], False, [HALF]),
        ([FULL, *SHARDS, "model.safetensors.index.json"], False, [FULL]),
        (
            [*SHARDS, "model.safetensors.index.json", "model.safetensors.index.fp16.json"],
            False,
            ["model.safetensors.index.json", *SHARDS],
        ),
        (
            [*SHARDS, HALF_SHARD, "model.safetensors.index.json",
             "model.safetensors.index.fp16.json"],
            True,
            ["model.safetensors.index.fp16.json", HALF_SHARD],
        ),
        (["other.safetensors", "sub/model.safetensors", "run.py"], False, []),
    ],
)  # fmt: skip
def test_one_set_of_weights_is_chosen(names: list[str], half: bool, wanted: list[str]) -> None:
    assert component_files("", names, half) == wanted


def test_a_lone_module_needs_its_configuration_and_weights() -> None:
    names = {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    assert set(module_files(names, half=False)) == names - {"README.md"}
    for missing in ("config.json", "diffusion_pytorch_model.safetensors"):
        with pytest.raises(InvalidModel):
            module_files(names - {missing}, half=False)


def test_a_lora_is_the_file_of_its_usual_name_or_the_only_one() -> None:
    assert lora_files({"a.safetensors", "pytorch_lora_weights.safetensors"}) == [
        "pytorch_lora_weights.safetensors"
    ]
    assert lora_files({"a.safetensors", "x/b.safetensors", "c.bin"}) == ["a.safetensors"]
    with pytest.raises(InvalidModel, match="2 safetensors files"):
        lora_files({"a.safetensors", "b.safetensors"})


def test_configurations_come_without_weights() -> None:
    assert set(config_files(NAMES)) == set(weights.config_files("sd15"))
