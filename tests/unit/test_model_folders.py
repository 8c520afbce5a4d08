"""Folders and pickles: what is refused as a model, and what is passed over."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from supervisor import folders
from supervisor import models as models_module
from supervisor.errors import Problem
from supervisor.families import Kind
from supervisor.models import Models
from supervisor.settings import Settings
from tests.tools import weights
from tests.tools.model_folders import LORA, broken, refusal
from tests.tools.weights import files, safetensors


class Alarm:
    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.where,)


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.ckpt", "bad.bin", "bad"])
@pytest.mark.parametrize("kind", ["checkpoint", "vae", "lora", "controlnet"])
def test_a_pickle_is_refused_under_any_name_and_not_opened(
    models: Models, root: Path, kind: Kind, name: str
) -> None:
    path = root / models_module.FOLDERS[kind] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Alarm(str(root / "opened"))))
    problem = refusal(models, kind, name)
    assert problem.code == "invalid_model"
    assert "pickle" in problem.detail
    assert not (root / "opened").exists()


def test_safetensors_under_another_suffix_are_refused(models: Models, root: Path) -> None:
    safetensors(root / "lora" / "style.ckpt", LORA)
    assert "must end in .safetensors" in refusal(models, "lora", "style.ckpt").detail


INDEX = weights.model_index("sd15")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pipeline.py": b""}, "pipeline.py"),
        ({"unet/my_unet.py": b""}, "unet/my_unet.py"),
        ({"model_index.json": INDEX | {"_class_name": ["my_pipeline", "Mine"]}}, "model_index"),
        ({"model_index.json": INDEX | {"_class_name": None}}, "model_index"),
        ({"model_index.json": INDEX | {"unet": ["my_unet", "MyUNet"]}}, "unet"),
        ({"model_index.json": INDEX | {"unet": ["os", "system"]}}, "unet"),
        ({"model_index.json": INDEX | {"unet": ["diffusers.utils", "Dummy"]}}, "unet"),
        ({"model_index.json": INDEX | {"unet": ["transformers", "__init__"]}}, "unet"),
        ({"model_index.json": INDEX | {"unet": ["diffusers"]}}, "unet"),
        ({"model_index.json": INDEX | {"../x": ["diffusers", "AutoencoderKL"]}}, "model_index"),
        ({"text_encoder/config.json": {"auto_map": {"AutoModel": "mine.Model"}}}, "text_encoder"),
        ({"tokenizer/tokenizer_config.json": {"auto_map": {}}}, "tokenizer_config.json"),
        ({"model_index.json": b"{"}, "model_index.json"),
        ({"model_index.json": b"[]"}, "model_index.json"),
        ({"unet/config.json": b"[" * 100_000}, "unet/config.json"),
        ({"unet/config.json": None}, "unet/config.json"),
        ({"unet/config.json": b" " * (5 * 2**20)}, "unet/config.json"),
        ({"scheduler/scheduler_config.json": None}, "scheduler/scheduler_config.json"),
        ({"tokenizer/merges.txt": None}, "tokenizer/merges.txt"),
        ({"tokenizer/tokenizer_config.json": None}, "tokenizer/tokenizer_config.json"),
        ({"unet/diffusion_pytorch_model.safetensors": None}, "unet/ has no safetensors"),
        ({"vae/diffusion_pytorch_model.safetensors": b"\x80\x04."}, "vae/diffusion_pytorch_model"),
        ({"vae/diffusion_pytorch_model.safetensors": b"short"}, "vae/diffusion_pytorch_model"),
        (
            {"unet/diffusion_pytorch_model.safetensors.index.json": {"weight_map": {"a": "b"}}},
            "unet/ lacks 1 of its shards",
        ),
        ({"unet/diffusion_pytorch_model.safetensors.index.fp16.json": {}}, "weight_map"),
        (
            {"model_index.json": INDEX | {"tokenizer_3": ["transformers", "T5Tokenizer"]}},
            "tokenizer_3/tokenizer_config.json, tokenizer_3/tokenizer.json",
        ),
    ],
)
@pytest.mark.usefixtures("sd15")
def test_a_folder_with_code_or_without_a_needed_file_is_refused(
    models: Models, root: Path, changes: dict[str, Any], named: str
) -> None:
    broken(root, changes)
    problem = refusal(models, "checkpoint", "sd15")
    assert problem.code == "invalid_model"
    assert named in problem.detail


@pytest.mark.usefixtures("sd15")
def test_a_folder_of_very_many_files_is_refused(
    models: Models, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MAX_FILES", 50)
    broken(root, {f"unet/{number}.txt": b"" for number in range(30)})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"
    broken(root, {f"unet/{number}.txt": b"" for number in range(30, 51)})
    assert "more than 50 files" in refusal(models, "checkpoint", "sd15").detail


@pytest.mark.usefixtures("sd15")
def test_hidden_files_in_a_folder_are_not_looked_at(models: Models, root: Path) -> None:
    files(root / "checkpoints" / "sd15", {".git/hook.py": None, "unet/.cache": None})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"


@pytest.mark.usefixtures("sd15")
def test_an_index_whose_shards_are_there_is_taken(models: Models, root: Path) -> None:
    index = {"weight_map": {"weight": "diffusion_pytorch_model.safetensors"}}
    broken(root, {"unet/diffusion_pytorch_model.safetensors.index.json": index})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"


@pytest.mark.usefixtures("sd15")
def test_what_lies_deep_in_a_folder_is_not_looked_at(models: Models, root: Path) -> None:
    deep = root / "checkpoints" / "sd15" / "a" / "b" / "c"
    files(deep, {f"{number}.txt": None for number in range(3)})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"


@pytest.mark.usefixtures("sd15")
def test_a_tokenizer_of_another_kind_may_keep_its_tokens_in_a_model_file(
    models: Models, root: Path
) -> None:
    changes = {
        "model_index.json": INDEX | {"tokenizer_3": ["transformers", "T5Tokenizer"]},
        "tokenizer_3/tokenizer_config.json": {},
        "tokenizer_3/spiece.model": b"",
    }
    broken(root, changes)
    assert models.resolve("checkpoint", "sd15").components["tokenizer_3"] == "T5Tokenizer"


@pytest.mark.usefixtures("sd15")
def test_a_component_with_pickles_alone_is_refused(models: Models, root: Path) -> None:
    name = "unet/diffusion_pytorch_model"
    broken(root, {f"{name}.safetensors": None, f"{name}.bin": pickle.dumps(Alarm("/x"))})
    assert "pickles are never opened" in refusal(models, "checkpoint", "sd15").detail


@pytest.mark.usefixtures("sd15")
def test_a_safety_checker_in_pickles_counts_as_none(models: Models, root: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    extractor = ["transformers", "CLIPImageProcessor"]
    changes = {
        "model_index.json": INDEX | {"safety_checker": checker, "feature_extractor": extractor},
        "safety_checker/config.json": {},
        "safety_checker/pytorch_model.bin": b"\x80\x04.",
        "feature_extractor/preprocessor_config.json": {},
    }
    broken(root, changes)
    found = models.resolve("checkpoint", "sd15")
    assert not found.has_safety_checker
    with pytest.raises(Problem, match="cannot check pictures"):
        models.safety_checker(found)
    safetensors(
        root / "checkpoints" / "sd15" / "safety_checker" / "model.safetensors", {"weight": (2,)}
    )
    assert models.safety_checker(models.resolve("checkpoint", "sd15")) is True


@pytest.mark.usefixtures("sd15")
def test_the_safety_checker_of_the_models_folder_serves_every_checkpoint(
    models: Models, root: Path
) -> None:
    files(root / "safety_checker", {"config.json": {}, "model.safetensors": {"weight": (2,)}})
    found = models.safety_checker(models.resolve("checkpoint", "sd15"))
    assert not isinstance(found, bool)
    assert found.path == str(root / "safety_checker")


@pytest.mark.usefixtures("sd15")
def test_what_was_looked_at_a_moment_ago_is_not_looked_at_again(root: Path) -> None:
    now = 0.0
    models = Models(Settings(model_dir=root), clock=lambda: now)
    models.resolve("checkpoint", "sd15")
    broken(root, {"vae/diffusion_pytorch_model.safetensors": b"\x80\x04."})
    now = models_module.FRESH_SECONDS - 0.1
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"
    now = models_module.FRESH_SECONDS
    assert refusal(models, "checkpoint", "sd15").code == "invalid_model"


@pytest.mark.usefixtures("sd15")
def test_a_changed_file_is_seen_and_an_unchanged_one_is_not_read_again(
    models: Models, root: Path
) -> None:
    first = models.resolve("checkpoint", "sd15")
    assert models.resolve("checkpoint", "sd15") is first
    (root / "checkpoints" / "sd15" / "igi.json").write_text('{"guidance_scale": 1.5}')
    assert models.resolve("checkpoint", "sd15").defaults == {"guidance_scale": 1.5}
    broken(root, {"vae/diffusion_pytorch_model.safetensors": b"\x80\x04."})
    assert refusal(models, "checkpoint", "sd15").code == "invalid_model"
