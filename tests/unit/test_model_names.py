"""Names of models: which resolve, which are refused, and that nothing outside is touched."""

from pathlib import Path

import pytest

from supervisor import models as models_module
from supervisor.errors import Problem
from supervisor.families import Kind
from supervisor.models import Models, is_safe_name
from supervisor.settings import Settings
from tests.tools import weights
from tests.tools.model_folders import LORA, refusal
from tests.tools.weights import files, safetensors

pytestmark = pytest.mark.usefixtures("sd15")


@pytest.mark.usefixtures("sdxl")
def test_a_checkpoint_folder_resolves_to_its_path_family_and_classes(
    models: Models, root: Path
) -> None:
    found = models.resolve("checkpoint", "sdxl")
    assert found.model.path == str(root / "checkpoints" / "sdxl")
    assert found.model.family == "sdxl"
    assert not found.model.single_file
    assert found.class_name == "StableDiffusionXLPipeline"
    assert found.scheduler == "DDIMScheduler"
    assert found.components["text_encoder_2"] == "CLIPTextModelWithProjection"
    assert not found.has_safety_checker


@pytest.mark.usefixtures("sdxl")
def test_names_may_have_folders_and_are_listed_with_them(models: Models, root: Path) -> None:
    files(root / "checkpoints" / "anime" / "one", weights.checkpoint_files("sd15"))
    assert models.names("checkpoint") == ["anime/one", "sd15", "sdxl"]
    assert models.resolve("checkpoint", "anime/one").model.name == "anime/one"
    assert models.names("lora") == ["style.safetensors"]
    assert models.names("vae") == []


FORBIDDEN = [
    "",
    ".",
    "..",
    "../secret",
    "sd15/../sd15",
    "sd15/../../../secret",
    "%2e%2e/secret",
    "..%2fsecret",
    "..\\secret",
    "C:\\secret",
    "/etc/passwd",
    "//etc/passwd",
    "sd15/",
    "/sd15",
    "sd15//unet",
    "sd15\0",
    "sd15\n",
    "\ud800",
    ".hidden",
    "sd15/.hidden",
    "x" * 300,
    "é" * 200,
    "a/" * 120 + "a",
    "~",
    "~root",
    "file:///etc/passwd",
    "link-out",
    "link-out/file",
    "loop",
    "dangling",
    "../checkpoints-secret/model",
    "missing",
    "sd15/unet/missing",
]


@pytest.fixture
def traps(root: Path) -> None:
    outside = files(root.parent / "outside", weights.checkpoint_files("sd15"))
    here = root / "checkpoints"
    files(root / "checkpoints-secret" / "model", weights.checkpoint_files("sd15"))
    files(here / ".hidden", weights.checkpoint_files("sd15"))
    (here / "link-out").symlink_to(outside)
    (here / "loop").symlink_to(here / "loop")
    (here / "dangling").symlink_to(here / "nothing")


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize("kind", ["checkpoint", "vae", "lora", "controlnet"])
def test_what_is_forbidden_is_answered_as_what_is_missing(models: Models, kind: Kind) -> None:
    answers = {refusal(models, kind, name).detail for name in FORBIDDEN}
    assert len(answers) == 1
    problem = refusal(models, kind, "missing")
    assert (problem.code, problem.field) == ("unknown_model", models_module.FIELDS[kind])


@pytest.mark.usefixtures("sdxl", "traps")
def test_what_is_forbidden_is_not_listed(models: Models) -> None:
    assert models.names("checkpoint") == ["sd15", "sdxl"]


def test_a_folder_with_the_same_prefix_is_outside(tmp_path: Path) -> None:
    files(tmp_path / "models-secret" / "model", weights.checkpoint_files("sd15"))
    here = tmp_path / "models" / "checkpoints"
    here.mkdir(parents=True, exist_ok=True)
    (here / "model").symlink_to(tmp_path / "models-secret" / "model")
    models = Models(Settings(model_dir=tmp_path / "models"))
    assert refusal(models, "checkpoint", "model").code == "unknown_model"


def test_a_link_within_the_models_is_followed(models: Models, root: Path) -> None:
    (root / "checkpoints" / "alias").symlink_to(root / "checkpoints" / "sd15")
    assert models.resolve("checkpoint", "alias").model.family == "sd15"
    assert "alias" in models.names("checkpoint")


@pytest.mark.usefixtures("sdxl")
def test_a_linked_model_folder_is_the_models_folder(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    models = Models(Settings(model_dir=link))
    assert models.resolve("checkpoint", "sd15").model.path == str(root / "checkpoints" / "sd15")
    assert models.names("checkpoint") == ["sd15", "sdxl"]


def test_a_file_that_leads_out_of_a_folder_is_refused(models: Models, root: Path) -> None:
    config = root / "checkpoints" / "sd15" / "unet" / "config.json"
    outside = root.parent / "config.json"
    config.rename(outside)
    config.symlink_to(outside)
    assert refusal(models, "checkpoint", "sd15").code == "invalid_model"


def test_ordinary_names_are_safe() -> None:
    for name in ("a", "SDXL/dream shaper_8 (v2).safetensors", "моделı.safetensors", "a%20b"):
        assert is_safe_name(name)


def test_a_problem_names_the_field_that_the_caller_gives(models: Models) -> None:
    with pytest.raises(Problem) as caught:
        models.resolve("checkpoint", "missing", field="refiner_model")
    assert caught.value.field == "refiner_model"


@pytest.mark.usefixtures("sdxl")
def test_only_so_many_models_are_remembered(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "MAX_REMEMBERED", 1)
    first = models.resolve("checkpoint", "sd15")
    models.resolve("checkpoint", "sdxl")
    assert models.resolve("checkpoint", "sd15") is not first


# What the demo ships.


@pytest.mark.usefixtures("sdxl")
def test_the_demo_is_known_by_its_name_when_it_is_there(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    monkeypatch.setattr(models_module, "DEMO_DIR", demo)
    assert refusal(models, "checkpoint", "demo").code == "unknown_model"
    assert not models.has_demo()
    files(demo / "checkpoint", weights.checkpoint_files("sd15"))
    safetensors(demo / "outline_lora.safetensors", LORA)
    assert models.has_demo()
    assert models.names("checkpoint") == ["demo", "sd15", "sdxl"]
    assert models.resolve("checkpoint", "demo").model.path == str(demo / "checkpoint")
    assert models.resolve("lora", "demo-outline").model.family == "sd15"
