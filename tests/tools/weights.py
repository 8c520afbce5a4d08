"""Files and folders of models made of zeros and configurations: all that the supervisor reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervisor.headers import Tensor

Shapes = Mapping[str, tuple[int, ...]]

TOKENIZER = {"tokenizer_config.json": {}, "vocab.json": {}, "merges.txt": None}


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    return {name: Tensor("F16", shape) for name, shape in shapes.items()}


def safetensors(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Path:
    """A whole file of zeros in fp16."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


def files(folder: Path, contents: Mapping[str, Any]) -> Path:
    """JSON by path; None makes an empty file, a .safetensors path takes shapes."""
    for parent in {(folder / name).parent for name in contents}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        if name.endswith(".safetensors"):
            safetensors(path, content)
        else:
            path.write_text("" if content is None else json.dumps(content))
    return folder


def family_configs(family: str) -> dict[str, dict[str, Any]]:
    """What tells the published checkpoints of a family apart, by component."""
    xl = {"addition_embed_type": "text_time", "use_linear_projection": True}
    unet = {
        "sd15": {"cross_attention_dim": 768},
        "sd21": {"cross_attention_dim": 1024, "use_linear_projection": True},
        "sdxl": {"cross_attention_dim": 2048, **xl},
        "sdxl_refiner": {"cross_attention_dim": 1280, **xl},
    }[family]
    scaling_factor = 0.13025 if "xl" in family else 0.18215
    encoders = {"sdxl": ["text_encoder", "text_encoder_2"], "sdxl_refiner": ["text_encoder_2"]}
    configs: dict[str, dict[str, Any]] = {
        "unet": {"in_channels": 4, **unet},
        "vae": {"latent_channels": 4, "scaling_factor": scaling_factor},
        "scheduler": {"prediction_type": "v_prediction" if family == "sd21" else "epsilon"},
    }
    encoder = {"architectures": ["CLIPTextModel"]}
    return configs | dict.fromkeys(encoders.get(family, ["text_encoder"]), encoder)


def model_index(family: str) -> dict[str, Any]:
    second = ["transformers", "CLIPTextModelWithProjection"]
    tokenizer = ["transformers", "CLIPTokenizer"]
    first = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": tokenizer}
    both = {"text_encoder_2": second, "tokenizer_2": tokenizer}
    name = {"sdxl": "XL", "sdxl_refiner": "XLImg2Img"}.get(family, "")
    return {
        "_class_name": f"StableDiffusion{name}Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **({} if family == "sdxl_refiner" else first),
        **(both if "xl" in family else {}),
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def config_files(family: str) -> dict[str, Any]:
    """A checkpoint's folder without its weights."""
    index, configs = model_index(family), family_configs(family)
    contents: dict[str, Any] = {"model_index.json": index}
    for name in (name for name, value in index.items() if isinstance(value, list)):
        if name.startswith("tokenizer"):
            contents |= {f"{name}/{file}": content for file, content in TOKENIZER.items()}
        elif name in configs:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            contents[f"{name}/{file}"] = configs[name]
    return contents


def checkpoint_files(family: str) -> dict[str, Any]:
    """A checkpoint's folder whose weights are one small tensor per component."""
    weights = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    weights |= {name: "model" for name in family_configs(family) if "text_encoder" in name}
    return config_files(family) | {
        f"{name}/{file}.safetensors": {"weight": (2, 2)} for name, file in weights.items()
    }


def single_file_shapes(family: str, width: int = 0) -> dict[str, tuple[int, ...]]:
    """The tensors that tell a checkpoint's family in its original single-file layout."""
    width = width or {"sd15": 768, "sd21": 1024, "sdxl": 2048, "sdxl_refiner": 1280}[family]
    unet = "model.diffusion_model."
    shapes: dict[str, tuple[int, ...]] = {
        unet + "input_blocks.0.0.weight": (8, 4, 3, 3),
        unet + "input_blocks.4.1.proj_in.weight": (8, 8, 1, 1) if family == "sd15" else (8, 8),
        unet + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (1, width),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    }
    if "xl" in family:
        shapes[unet + "label_emb.0.0.weight"] = (8, 8)
    encoders = {
        "sd15": ["cond_stage_model.transformer.text_model"],
        "sd21": ["cond_stage_model.model"],
        "sdxl": ["conditioner.embedders.0.transformer.text_model", "conditioner.embedders.1.model"],
        "sdxl_refiner": ["conditioner.embedders.0.model"],
    }[family]
    return shapes | {f"{encoder}.weight": (2, 2) for encoder in encoders}
