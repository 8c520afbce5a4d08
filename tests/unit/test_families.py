"""Families, told from configurations and from tensors' names and shapes."""

from typing import Any

import pytest

from supervisor.families import (
    Traits,
    WrongKind,
    checkpoint_traits,
    misfit,
    module_traits,
)
from supervisor.file_families import file_kind, file_traits
from supervisor.headers import InvalidModel
from tests.tools import weights
from tests.tools.weights import tensors

FAMILIES = ["sd15", "sd21", "sdxl", "sdxl_refiner"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_tells_its_family(family: str) -> None:
    traits = checkpoint_traits(weights.model_index(family), weights.family_configs(family))
    assert traits.family == family
    assert traits.latent_channels == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_model_counts_as_one_of_its_family(family: str) -> None:
    configs = weights.family_configs(family)
    configs["unet"]["cross_attention_dim"] = 32
    assert checkpoint_traits(weights.model_index(family), configs).family == family


@pytest.mark.parametrize(
    ("class_name", "unet"),
    [
        ("StableDiffusion3Pipeline", None),
        ("FluxPipeline", None),
        ("StableDiffusionUpscalePipeline", {"in_channels": 7}),
        ("StableDiffusionDepth2ImgPipeline", {"in_channels": 5, "use_linear_projection": True}),
        ("StableDiffusionXLInstructPix2PixPipeline", {"in_channels": 8}),
        ("StableUnCLIPPipeline", {"in_channels": 4, "class_embed_type": "projection"}),
        ("KolorsPipeline", {"in_channels": 4, "addition_embed_type": "text_time"}),
    ],
)
def test_what_only_looks_like_a_family_is_other(class_name: str, unet: Any) -> None:
    configs = {"text_encoder": {"hidden_act": "gelu"}, "vae": {"latent_channels": 4}}
    configs |= {"unet": unet} if unet else {"transformer": {}}
    assert checkpoint_traits({"_class_name": class_name}, configs).family == "other"


def test_an_inpainting_model_keeps_its_family_and_tells_its_channels() -> None:
    configs = weights.family_configs("sd15")
    configs["unet"]["in_channels"] = 9
    traits = checkpoint_traits({"_class_name": "StableDiffusionInpaintPipeline"}, configs)
    assert (traits.family, traits.in_channels) == ("sd15", 9)


def test_configurations_of_the_wrong_types_do_not_break_the_reading() -> None:
    configs: dict[str, Any] = {"unet": {"in_channels": [4], "cross_attention_dim": [768, 768]}}
    traits = checkpoint_traits({"_class_name": 7}, configs)
    assert traits == Traits(family="other")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_tells_its_family(family: str) -> None:
    shapes = weights.single_file_shapes(family, width=32)
    traits = file_traits("checkpoint", tensors(shapes), {})
    assert traits.family == family
    assert (traits.in_channels, traits.latent_channels) == (4, 4)
    assert traits.cross_attention_dim == 32


@pytest.mark.parametrize(("left_out", "part"), [("first_stage", "VAE"), ("cond_stage", "text")])
def test_a_single_file_without_one_of_its_parts_is_refused(left_out: str, part: str) -> None:
    shapes = weights.single_file_shapes("sd15")
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(left_out)}
    with pytest.raises(InvalidModel, match=f"holds no {part}"):
        file_traits("checkpoint", tensors(shapes), {})


def test_a_single_file_tells_its_prediction_type_where_its_maker_left_a_mark() -> None:
    shapes = weights.single_file_shapes("sdxl")
    assert file_traits("checkpoint", tensors(shapes), {}).prediction_type is None
    told = file_traits("checkpoint", tensors(shapes), {"modelspec.prediction_type": "epsilon"})
    assert told.prediction_type == "epsilon"
    marked = file_traits("checkpoint", tensors({**shapes, "v_pred": (0,)}), {})
    assert marked.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "changes",
    [
        {"model.diffusion_model.label_emb.0.0.weight": (8, 8)},
        {"model.diffusion_model.input_blocks.0.0.weight": (8, 5, 3, 3)},
        {"edm_mean": (4,)},
    ],
)
def test_a_single_file_that_only_looks_like_a_family_is_other(
    changes: dict[str, tuple[int, ...]],
) -> None:
    shapes = weights.single_file_shapes("sd21") | changes
    assert file_traits("checkpoint", tensors(shapes), {}).family == "other"


def test_a_transformer_in_a_single_file_is_other() -> None:
    shapes = {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (8,)}
    assert file_traits("checkpoint", tensors(shapes), {}).family == "other"


KOHYA = "lora_unet_down_blocks_1_attentions_0_"
DIFFUSERS = "unet.down_blocks.1.attentions.0."
CROSS = "transformer_blocks_0_attn2_to_k.lora_down.weight"


@pytest.mark.parametrize(
    ("shapes", "family", "width"),
    [
        ({KOHYA + CROSS: (4, 768)}, "sd15", 768),
        ({KOHYA + CROSS: (4, 1024)}, "sd21", 1024),
        ({KOHYA + CROSS: (4, 32), KOHYA + "proj_in.lora_down.weight": (4, 8, 1, 1)}, "sd15", 32),
        ({KOHYA + CROSS: (4, 32), KOHYA + "proj_in.lora_down.weight": (4, 8)}, "sd21", 32),
        ({"lora_unet_input_blocks_4_1_" + CROSS: (4, 2048)}, "sdxl", 2048),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)}, "sdxl", None),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)}, None, None),
        ({DIFFUSERS + "transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}, "sd15", 768),
        ({DIFFUSERS + "transformer_blocks.0.attn2.to_k.lora.down.weight": (4, 768)}, "sd15", 768),
        (
            {DIFFUSERS + "transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 1024)},
            "sd21",
            1024,
        ),
        ({DIFFUSERS + "transformer_blocks.1.attn2.to_k.lora_A.weight": (4, 64)}, "sdxl", 64),
        (
            {"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": (4, 8)},
            "other",
            None,
        ),
        ({"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": (4, 8)}, "other", None),
    ],
)
def test_a_lora_tells_its_family_in_both_layouts(
    shapes: dict[str, tuple[int, ...]], family: str | None, width: int | None
) -> None:
    traits = file_traits("lora", tensors(shapes), {})
    assert (traits.family, traits.cross_attention_dim) == (family, width)


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize(
    ("marks", "family"),
    [
        ({"input_blocks.1.1.proj_in.weight": (8, 8, 1, 1)}, "sd15"),
        ({"input_blocks.1.1.proj_in.weight": (8, 8)}, "sd21"),
        ({"input_blocks.4.1.proj_in.weight": (8, 8), "label_emb.0.0.weight": (8, 8)}, "sdxl"),
    ],
)
def test_a_controlnet_file_tells_its_family(
    prefix: str, marks: dict[str, tuple[int, ...]], family: str
) -> None:
    shapes = {prefix + name: shape for name, shape in marks.items()}
    shapes[prefix + "input_hint_block.0.weight"] = (8, 3, 3, 3)
    assert file_traits("controlnet", tensors(shapes), {}).family == family


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_file_tells_its_latent_channels(prefix: str) -> None:
    shapes = {prefix + "decoder.conv_in.weight": (8, 16, 3, 3)}
    assert file_traits("vae", tensors(shapes), {}).latent_channels == 16


def test_a_file_of_another_kind_is_told_as_what_it_is() -> None:
    checkpoint = tensors(weights.single_file_shapes("sd15"))
    with pytest.raises(WrongKind, match="it is a checkpoint, not a LoRA"):
        file_traits("lora", checkpoint, {})
    with pytest.raises(WrongKind, match="it is a LoRA, not a VAE"):
        file_traits("vae", tensors({KOHYA + CROSS: (4, 768)}), {})


def test_a_file_of_no_known_kind_is_refused() -> None:
    assert file_kind(tensors({"weight": (2,)})) is None
    with pytest.raises(InvalidModel, match="known layout"):
        file_traits("lora", tensors({"weight": (2,)}), {})


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"cross_attention_dim": 768}, "sd15"),
        ({"cross_attention_dim": 1024, "use_linear_projection": True}, "sd21"),
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "sdxl"),
        ({"joint_attention_dim": 4096}, None),
    ],
)
def test_a_controlnet_folder_tells_its_family(config: dict[str, Any], family: str | None) -> None:
    traits = module_traits("controlnet", {"_class_name": "ControlNetModel", **config})
    assert traits.family == family


def test_a_module_folder_of_another_kind_is_told_as_what_it_is() -> None:
    with pytest.raises(WrongKind, match="it is a ControlNetModel, not a VAE"):
        module_traits("vae", {"_class_name": "ControlNetModel"})


SDXL = Traits(family="sdxl", cross_attention_dim=2048, latent_channels=4, scaling_factor=0.13025)


@pytest.mark.parametrize(
    ("kind", "other", "reason"),
    [
        ("vae", Traits(latent_channels=4, scaling_factor=0.13025), None),
        ("vae", Traits(latent_channels=4), None),
        ("vae", Traits(latent_channels=16), "latent channels differ: 4 and 16"),
        ("vae", Traits(latent_channels=4, scaling_factor=0.18215), "sd15 and sd21"),
        ("controlnet", Traits(family="sdxl", cross_attention_dim=2048), None),
        ("controlnet", Traits(family="sdxl", cross_attention_dim=64), "widths"),
        ("lora", Traits(family="sd15"), "families differ"),
        ("lora", Traits(family="other"), "families differ"),
        ("lora", Traits(), None),
        ("checkpoint", Traits(family="sdxl_refiner", cross_attention_dim=1280), None),
        ("checkpoint", SDXL, "refiner"),
    ],
)
def test_models_that_do_not_fit_are_told_apart(
    kind: Any, other: Traits, reason: str | None
) -> None:
    found = misfit(kind, SDXL, other)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_checkpoint_of_no_known_family_takes_what_fits_by_its_numbers() -> None:
    depth = Traits(family="other", cross_attention_dim=1024)
    assert misfit("lora", depth, Traits(family="sd21", cross_attention_dim=1024)) is None
    assert misfit("lora", depth, Traits(family="sd15", cross_attention_dim=768))
