"""Names of models: which resolve, which are refused, and that nothing outside is touched."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from supervisor import models as models_module
from supervisor.errors import Problem
from supervisor.families import Kind
from supervisor.models import Models, is_safe_name
from supervisor.settings import Settings
from tests.tools import weights
from tests.tools.weights import files, safetensors

LORA = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}


@pytest.fixture(autouse=True)
def no_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo that comes with the project is no part of these folders."""
    monkeypatch.setattr(models_module, "DEMO_DIR", tmp_path / "no_demo")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    files(root / "checkpoints" / "sd15", weights.checkpoint_files("sd15"))
    safetensors(root / "lora" / "style.safetensors", LORA)
    return root


@pytest.fixture
def sdxl(root: Path) -> Path:
    return files(root / "checkpoints" / "sdxl", weights.checkpoint_files("sdxl"))


@pytest.fixture
def models(root: Path) -> Models:
    return Models(Settings(model_dir=root, data_dir=root.parent / "data"))


def refusal(models: Models, kind: Kind, name: str) -> Problem:
    with pytest.raises(Problem) as caught:
        models.resolve(kind, name)
    assert "/models" not in caught.value.detail
    return caught.value


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
    here.mkdir(parents=True)
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


def broken(root: Path, changes: dict[str, Any], family: str = "sd15") -> None:
    """Change files of the checkpoint: None removes one, bytes replace it, else JSON."""
    for name, content in changes.items():
        path = root / "checkpoints" / family / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content))


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
def test_a_folder_with_code_or_without_a_needed_file_is_refused(
    models: Models, root: Path, changes: dict[str, Any], named: str
) -> None:
    broken(root, changes)
    problem = refusal(models, "checkpoint", "sd15")
    assert problem.code == "invalid_model"
    assert named in problem.detail


def test_a_folder_of_very_many_files_is_refused(models: Models, root: Path) -> None:
    broken(root, {f"unet/{number}.txt": b"" for number in range(1001)})
    assert "more than 1000 files" in refusal(models, "checkpoint", "sd15").detail


def test_hidden_files_in_a_folder_are_not_looked_at(models: Models, root: Path) -> None:
    files(root / "checkpoints" / "sd15", {".git/hook.py": None, "unet/.cache": None})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"


def test_an_index_whose_shards_are_there_is_taken(models: Models, root: Path) -> None:
    index = {"weight_map": {"weight": "diffusion_pytorch_model.safetensors"}}
    broken(root, {"unet/diffusion_pytorch_model.safetensors.index.json": index})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"


def test_what_lies_deep_in_a_folder_is_not_looked_at(models: Models, root: Path) -> None:
    deep = root / "checkpoints" / "sd15" / "a" / "b" / "c"
    files(deep, {f"{number}.txt": None for number in range(3)})
    assert models.resolve("checkpoint", "sd15").model.family == "sd15"


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


def test_a_component_with_pickles_alone_is_refused(models: Models, root: Path) -> None:
    name = "unet/diffusion_pytorch_model"
    broken(root, {f"{name}.safetensors": None, f"{name}.bin": pickle.dumps(Alarm("/x"))})
    assert "pickles are never opened" in refusal(models, "checkpoint", "sd15").detail


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


def test_the_safety_checker_of_the_models_folder_serves_every_checkpoint(
    models: Models, root: Path
) -> None:
    files(root / "safety_checker", {"config.json": {}, "model.safetensors": {"weight": (2,)}})
    found = models.safety_checker(models.resolve("checkpoint", "sd15"))
    assert not isinstance(found, bool)
    assert found.path == str(root / "safety_checker")


def test_a_changed_file_is_seen_and_an_unchanged_one_is_not_read_again(
    models: Models, root: Path
) -> None:
    first = models.resolve("checkpoint", "sd15")
    assert models.resolve("checkpoint", "sd15") is first
    (root / "checkpoints" / "sd15" / "igi.json").write_text('{"guidance_scale": 1.5}')
    assert models.resolve("checkpoint", "sd15").defaults == {"guidance_scale": 1.5}
    broken(root, {"vae/diffusion_pytorch_model.safetensors": b"\x80\x04."})
    assert refusal(models, "checkpoint", "sd15").code == "invalid_model"


def test_a_sidecar_tells_family_prediction_type_and_defaults(models: Models, root: Path) -> None:
    told = {"family": "sd21", "prediction_type": "v_prediction", "num_inference_steps": 4}
    told["scheduler"] = "LCMScheduler"
    (root / "checkpoints" / "sd15" / "igi.json").write_text(json.dumps(told))
    found = models.resolve("checkpoint", "sd15")
    assert (found.model.family, found.model.prediction_type) == ("sd21", "v_prediction")
    assert found.defaults == {"num_inference_steps": 4, "scheduler": "LCMScheduler"}
    assert found.scheduler == "LCMScheduler"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"family": "sd3"}', "family"),
        ('{"num_inference_steps": 0}', "num_inference_steps"),
        ('{"guidance_scale": "high"}', "guidance_scale"),
        ('{"width": 500.5}', "width"),
        ('{"famly": "sd15"}', "famly"),
        ("{", "style.json"),
        ("[" * 100_000, "style.json"),
    ],
)
def test_a_bad_sidecar_is_refused_by_its_field(
    models: Models, root: Path, text: str, named: str
) -> None:
    (root / "lora" / "style.json").write_text(text)
    problem = refusal(models, "lora", "style.safetensors")
    assert problem.code == "invalid_model"
    assert named in problem.detail


def test_a_lora_resolves_with_its_family(models: Models) -> None:
    found = models.resolve("lora", "style.safetensors")
    assert found.model.single_file
    assert found.model.family == "sd15"


def test_a_model_of_another_kind_is_told_as_what_it_is(models: Models, root: Path) -> None:
    safetensors(root / "checkpoints" / "style.safetensors", LORA)
    problem = refusal(models, "checkpoint", "style.safetensors")
    assert problem.code == "incompatible_model"
    assert "it is a LoRA, not a checkpoint" in problem.detail
    files(root / "vae" / "whole", weights.checkpoint_files("sd15"))
    assert refusal(models, "vae", "whole").code == "incompatible_model"
    files(root / "checkpoints" / "lone", {"config.json": {"_class_name": "AutoencoderKL"}})
    assert "it is a AutoencoderKL" in refusal(models, "checkpoint", "lone").detail


VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.13025}


@pytest.mark.usefixtures("sdxl")
def test_a_vae_folder_resolves_and_must_fit(models: Models, root: Path) -> None:
    files(root / "vae" / "fix", {"config.json": VAE, "x.safetensors": {"weight": (2,)}})
    found = models.resolve("vae", "fix")
    models.check_fit(models.resolve("checkpoint", "sdxl"), [found])
    with pytest.raises(Problem, match=r"'fix'.*'sd15' \(family sd15\)") as caught:
        models.check_fit(models.resolve("checkpoint", "sd15"), [found])
    assert (caught.value.code, caught.value.field) == ("incompatible_model", "vae")


@pytest.mark.usefixtures("sdxl")
def test_a_lora_of_another_family_is_refused_naming_both(models: Models) -> None:
    lora = models.resolve("lora", "style.safetensors")
    models.check_fit(models.resolve("checkpoint", "sd15"), [lora])
    with pytest.raises(Problem, match=r"style.*family sd15.*family sdxl") as caught:
        models.check_fit(models.resolve("checkpoint", "sdxl"), [lora])
    assert caught.value.field == "loras"


# Single files.


def single(root: Path, family: str, kind: str = "checkpoints") -> Path:
    return safetensors(root / kind / f"{family}.safetensors", weights.single_file_shapes(family))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sdxl_refiner"])
def test_a_single_file_takes_the_configurations_of_its_family(
    models: Models, root: Path, family: str
) -> None:
    path = single(root, family)
    files(root / "configs" / family, weights.config_files(family))
    found = models.resolve("checkpoint", f"{family}.safetensors")
    assert found.model.single_file
    assert found.model.path == str(path)
    assert found.model.config == str(root / "configs" / family)
    assert found.model.family == family
    assert found.scheduler == "DDIMScheduler"
    assert found.traits.scaling_factor == (0.13025 if "xl" in family else 0.18215)


def test_every_missing_configuration_is_named(models: Models, root: Path) -> None:
    single(root, "sd15")
    detail = refusal(models, "checkpoint", "sd15.safetensors").detail
    for name in weights.config_files("sd15"):
        assert f"configs/sd15/{name}" in detail


def test_a_missing_tokenizer_file_alone_is_named(models: Models, root: Path) -> None:
    single(root, "sdxl")
    files(root / "configs" / "sdxl", weights.config_files("sdxl"))
    (root / "configs" / "sdxl" / "tokenizer_2" / "vocab.json").unlink()
    problem = refusal(models, "checkpoint", "sdxl.safetensors")
    assert problem.code == "invalid_model"
    assert problem.detail.endswith("configs/sdxl/tokenizer_2/vocab.json")


def test_configurations_of_another_width_are_refused(models: Models, root: Path) -> None:
    single(root, "sd15")
    contents = weights.config_files("sd15")
    contents["unet/config.json"] = {"in_channels": 4, "cross_attention_dim": 32}
    files(root / "configs" / "sd15", contents)
    assert "configs/sd15" in refusal(models, "checkpoint", "sd15.safetensors").detail


def test_a_single_file_of_no_known_family_is_refused(models: Models, root: Path) -> None:
    shapes = {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (8,)}
    safetensors(root / "checkpoints" / "flux.safetensors", shapes)
    assert "Diffusers folders" in refusal(models, "checkpoint", "flux.safetensors").detail


@pytest.mark.parametrize("name", ["sd21.json", "sd21.safetensors.json"])
def test_a_sidecar_lies_beside_its_file(models: Models, root: Path, name: str) -> None:
    single(root, "sd21")
    files(root / "configs" / "sd21", weights.config_files("sd21"))
    (root / "checkpoints" / name).write_text('{"prediction_type": "epsilon", "width": 512}')
    found = models.resolve("checkpoint", "sd21.safetensors")
    assert found.model.prediction_type == "epsilon"
    assert found.defaults == {"width": 512}


def test_a_lone_vae_or_controlnet_takes_its_checkpoints_configuration(
    models: Models, root: Path
) -> None:
    safetensors(root / "vae" / "v.safetensors", {"decoder.conv_in.weight": (8, 4, 3, 3)})
    hint = {"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}
    safetensors(root / "controlnet" / "c.safetensors", hint)
    checkpoint = models.resolve("checkpoint", "sd15")
    kinds: dict[Kind, str] = {"vae": "v.safetensors", "controlnet": "c.safetensors"}
    for kind, name in kinds.items():
        found = models.resolve(kind, name, checkpoint)
        assert found.model.config == checkpoint.model.path


def test_a_lone_vae_may_say_its_family_itself(models: Models, root: Path) -> None:
    safetensors(root / "vae" / "v.safetensors", {"decoder.conv_in.weight": (8, 4, 3, 3)})
    assert "known family" in refusal(models, "vae", "v.safetensors").detail
    (root / "vae" / "v.json").write_text('{"family": "sdxl"}')
    assert "configs/sdxl/vae/config.json" in refusal(models, "vae", "v.safetensors").detail
    files(root / "configs" / "sdxl", {"vae/config.json": VAE})
    found = models.resolve("vae", "v.safetensors")
    assert (found.model.config, found.traits.scaling_factor) == (
        str(root / "configs" / "sdxl"),
        0.13025,
    )


def test_an_oversized_sidecar_is_refused(models: Models, root: Path) -> None:
    (root / "lora" / "style.json").write_bytes(b" " * 70_000)
    assert "style.json" in refusal(models, "lora", "style.safetensors").detail


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
