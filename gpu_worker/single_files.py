"""Single files: a checkpoint, VAE or ControlNet whose tensors lie in one safetensors file.

Their names are those of LDM and SGM, or a Diffusers module's own. Configurations and
tokenizers come from the folder that the model's `config` names. A tensor that is missing,
left over or of another shape is an error: nothing is guessed, fetched, or drawn at random.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpu_worker import folders, original_names
from gpu_worker.folders import BrokenModel
from gpu_worker.original_names import Tensors
from ipc.messages import Model

PLACES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0."),
}
"""Where a checkpoint's parts lie; of several places the first that is there. An SDXL has both
embedders, its refiner one, which is the second text encoder."""
NOT_HELD = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
"""Parts that a pipeline's index may list and that a single file does not hold."""


class Plan(NamedTuple):
    """What a module is to be made of. `weights` are named as in a folder's file of it, and
    views of the single file.

    `config` is a dictionary for Diffusers' models, a configuration object for Transformers'.
    """

    kind: type[Any]
    config: Any
    weights: Tensors


Ready = Callable[[Tensors], Tensors]
"""Makes a module's own weights of a file's: of its type, on its device, free to be written."""


class SingleFile:
    """A checkpoint in one file. Nothing but its header is read until a part is loaded."""

    def __init__(self, model: Model, tensors: Tensors | None = None) -> None:
        """`tensors`: the file's, if they are mapped already. Raises BrokenModel, OSError."""
        self.config = config_folder(model)
        self._tensors = read(model) if tensors is None else tensors

    def bytes(self, dtype: torch.dtype) -> int:
        """What its parts take in memory."""
        prefixes = tuple(place for places in PLACES.values() for place in places)
        held = {name: t for name, t in self._tensors.items() if name.startswith(prefixes)}
        return tensor_bytes(held, dtype)

    def load_part(self, name: str, kind: type[Any], dtype: torch.dtype, device: str) -> Any:
        """One part as a folder would give it, on the device. Raises BrokenModel."""
        if issubclass(kind, (ModelMixin, transformers.PreTrainedModel)):
            return built(self.plan(name, kind), copied_to(device, dtype))
        part = folders.load_part(self.config / name, kind, dtype)
        if "ztsnr" in self._tensors:  # trainers mark zero terminal SNR by an empty tensor
            return changed(part, rescale_betas_zero_snr=True)
        return part

    def plan(self, name: str, kind: type[Any]) -> Plan:
        """A part that has weights. Raises BrokenModel."""
        folder = self.config / name
        prefix, tensors = self._part(name)
        if issubclass(kind, transformers.PreTrainedModel):
            config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
            layers, projects = config.num_hidden_layers, "WithProjection" in kind.__name__
            weights = original_names.text_encoder(tensors, prefix, layers, projects)
            return Plan(kind, config, weights)
        settings = folders.read_json(folder / "config.json")
        if kind is diffusers.UNet2DConditionModel:
            return unet_plan(settings, tensors)
        if kind is diffusers.AutoencoderKL:
            return Plan(kind, settings, original_names.vae(tensors, settings))
        raise BrokenModel(f"a single file holds no {kind.__name__}")

    def _part(self, name: str) -> tuple[str, Tensors]:
        for prefix in PLACES.get(name, ()):
            found = {key: t for key, t in self._tensors.items() if key.startswith(prefix)}
            if found:
                return prefix, found
        raise BrokenModel(f"it holds no {name}")


def module_plan(model: Model, kind: str, tensors: Tensors | None = None) -> Plan:
    """A lone `vae` or `controlnet`. `tensors`: the file's, if they are mapped already.

    Raises BrokenModel, OSError.
    """
    tensors = read(model) if tensors is None else tensors
    return vae_plan(model, tensors) if kind == "vae" else controlnet_plan(model, tensors)


def unet_plan(config: Mapping[str, Any], tensors: Tensors) -> Plan:
    """An inpainting checkpoint's denoiser has more channels than its family's."""
    weights = original_names.unet(tensors, config)
    channels = {"in_channels": weights["conv_in.weight"].shape[1]}
    return Plan(diffusers.UNet2DConditionModel, {**config, **channels}, weights)


def vae_plan(model: Model, tensors: Tensors) -> Plan:
    """Shaped and scaled by vae/config.json of the model's `config`."""
    config = folders.read_json(config_folder(model) / "vae" / "config.json")
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        raise BrokenModel(f"it goes with checkpoints whose VAE is no {class_name}")
    return Plan(diffusers.AutoencoderKL, config, original_names.vae(tensors, config))


def controlnet_plan(model: Model, tensors: Tensors) -> Plan:
    """Shaped as the UNet of `config`'s unet/config.json, but for its own inputs."""
    config = folders.read_json(config_folder(model) / "unet" / "config.json")
    weights = original_names.controlnet(tensors, config)
    accepted = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    shared = {name: value for name, value in config.items() if name in accepted}
    return Plan(diffusers.ControlNetModel, shared | input_channels(weights), weights)


def input_channels(weights: Tensors) -> dict[str, Any]:
    """What a ControlNet's weights tell of its shape: the channels from picture to latents."""
    hint = "controlnet_cond_embedding."
    widening = sorted(
        (int(name.split(".")[2]), tensor.shape[0])
        for name, tensor in weights.items()
        if name.startswith(f"{hint}blocks.") and name.endswith(".weight")
    )
    first = weights[f"{hint}conv_in.weight"]
    return {
        "in_channels": weights["conv_in.weight"].shape[1],
        "conditioning_channels": first.shape[1],
        # Of each two layers the second widens.
        "conditioning_embedding_out_channels": (
            first.shape[0],
            *(channels for index, channels in widening if index % 2),
        ),
    }


def with_prediction_type(scheduler: Any, prediction_type: str | None) -> Any:
    """A checkpoint's scheduler, changed where its sidecar or its file tells what it predicts."""
    if prediction_type is None:
        return scheduler
    return changed(scheduler, prediction_type=prediction_type)


def changed(part: Any, **settings: Any) -> Any:
    """A scheduler with those of the settings that it has; anything else as it is."""
    if not isinstance(part, diffusers.SchedulerMixin):
        return part
    taken = {name: value for name, value in settings.items() if name in part.config}
    return type(part).from_config(part.config, **taken) if taken else part


def config_folder(model: Model) -> Path:
    if model.config is None:
        raise BrokenModel("its family's configurations are not there")
    return Path(model.config)


def read(model: Model) -> Tensors:
    """A file's tensors, mapped rather than read. Raises BrokenModel, FileNotFoundError."""
    Path(model.path).stat()
    try:
        return dict(load_file(model.path))
    except (SafetensorError, OSError, ValueError):
        raise BrokenModel("it is not whole safetensors") from None


def tensor_bytes(tensors: Tensors, dtype: torch.dtype) -> int:
    return sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize


def built(plan: Plan, ready: Ready) -> Any:
    """A module of ready weights, in evaluation mode. Raises BrokenModel where they misfit."""
    if issubclass(plan.kind, transformers.PreTrainedModel):
        return _built_by_transformers(plan, ready)
    with torch.device("meta"):
        module = plan.kind.from_config(dict(plan.config))
    expected, name = module.state_dict(), plan.kind.__name__
    _refuse(expected.keys() - plan.weights.keys(), f"its {name} lacks")
    _refuse(plan.weights.keys() - expected.keys(), f"its {name} has, where none belongs,")
    wrong = [key for key in expected if expected[key].shape != plan.weights[key].shape]
    _refuse(wrong, f"its {name} is not shaped as its family's: see")
    module.load_state_dict(ready(plan.weights), assign=True)
    return module.eval()


def _built_by_transformers(plan: Plan, ready: Ready) -> Any:
    """Its text encoders make buffers that no file holds."""
    weights = ready(plan.weights)
    first = next(iter(weights.values()))
    model, report = plan.kind.from_pretrained(
        None,
        config=plan.config,
        state_dict=weights,
        dtype=first.dtype,
        output_loading_info=True,
    )
    _refuse(report["missing_keys"], f"its {plan.kind.__name__} lacks")
    return model.to(first.device).eval()


def _refuse(names: Any, problem: str) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise BrokenModel(f"{problem} {min(names)}{more}")


def copied_to(device: str, dtype: torch.dtype) -> Ready:
    """Copies: the file may be mapped read-only, and a LoRA is taken out again by the file."""
    usual = torch.contiguous_format
    return lambda tensors: {
        name: tensor.to(device, dtype, copy=True, memory_format=usual)
        for name, tensor in tensors.items()
    }
