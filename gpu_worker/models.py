"""The models that a request needs: loaded from the library, and checked to fit each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker.failures import Refusal
from gpu_worker.holdings import Holding
from gpu_worker.library import Library
from gpu_worker.lora_files import Lora
from gpu_worker.reader import Nothing
from gpu_worker.vaes import pipeline_upcasts
from ipc.messages import Generate, Load, Model


@dataclass(frozen=True)
class Models:
    """Everything that a request runs with, loaded."""

    checkpoint: Holding
    vae: Holding | None = None
    controlnets: tuple[Holding, ...] = ()
    safety_checker: Holding | None = None
    refiner: Holding | None = None
    loras: tuple[tuple[Lora, float], ...] = ()
    """LoRAs to merge into the checkpoint, with their scales."""

    @property
    def decoder(self) -> Any:
        """The VAE that turns latents into pictures, or None."""
        return self.vae.module if self.vae is not None else self.checkpoint.parts.get("vae")

    def __iter__(self) -> Iterator[Holding]:
        singles = (self.checkpoint, self.vae, self.safety_checker, self.refiner)
        yield from (holding for holding in singles if holding is not None)
        yield from self.controlnets


def adapted(work: Generate, library: Library, step: Nothing) -> Models:
    """A request's models, with its LoRAs in the checkpoint; raises what `load` does."""
    wanted = load(work, library, step)
    library.adapt(wanted.checkpoint, wanted.loras)
    return wanted


def loaded(work: Load, library: Library, step: Nothing) -> Models:
    """A checkpoint that is to be held, and the VAE for it; raises what `load` does."""
    checkpoint = library.checkpoint(work.checkpoint, step)
    with library.use(checkpoint):
        vae = None if work.vae is None else load_vae(work.vae, library, checkpoint)
    return Models(checkpoint, vae)


def load(request: Generate, library: Library, step: Nothing) -> Models:
    """Loads what the request needs; `step` is called in between. Raises Refusal, MemoryShort."""
    checkpoint = library.checkpoint(request.checkpoint, step)
    with library.use(checkpoint):
        refiner = _refiner(request, library, step)
        with library.use(*([refiner] if refiner else [])):
            return Models(
                checkpoint,
                None if request.vae is None else load_vae(request.vae, library, checkpoint),
                tuple(_controlnet(net, library, checkpoint) for net in request.controlnets),
                _safety_checker(request, library),
                refiner,
                tuple((library.lora(lora.model, checkpoint), lora.scale) for lora in request.loras),
            )


def _refiner(request: Generate, library: Library, step: Nothing) -> Holding | None:
    if request.refiner is None:
        return None
    model = request.refiner.checkpoint
    holding = library.checkpoint(model, step)
    if holding.parts.get("text_encoder") is not None or "text_encoder_2" not in holding.parts:
        detail = f"cannot refine with {model.name!r}: it is no SDXL refiner"
        raise Refusal("incompatible_model", detail, "refiner_model")
    return holding


def load_vae(model: Model, library: Library, checkpoint: Holding) -> Holding:
    """A VAE to use with a checkpoint in place of its own. Raises Refusal where it does not fit."""
    holding = library.vae(model, pipeline_upcasts(checkpoint.pipeline))
    if not hasattr(holding.module, "decode"):
        raise _wrong_kind(model, holding, "vae", "a VAE")
    _same(model, holding, "vae", checkpoint, checkpoint.parts.get("vae"), "latent_channels")
    library.pair(checkpoint, holding)
    return holding


def _controlnet(model: Model, library: Library, checkpoint: Holding) -> Holding:
    holding = library.controlnet(model)
    if "ControlNet" not in type(holding.module).__name__:
        raise _wrong_kind(model, holding, "control_model", "a ControlNet")
    unet = checkpoint.parts.get("unet")
    _same(model, holding, "control_model", checkpoint, unet, "cross_attention_dim")
    return holding


def _wrong_kind(model: Model, holding: Holding, field: str, needed: str) -> Refusal:
    kind = type(holding.module).__name__
    detail = f"cannot use {model.name!r} as {needed}: it is of class {kind}"
    return Refusal("incompatible_model", detail, field)


def _same(
    model: Model, holding: Holding, field: str, checkpoint: Holding, own: Any, setting: str
) -> None:
    """Raises Refusal where a model's setting differs from that of the checkpoint's own part."""
    theirs = getattr(getattr(own, "config", None), setting, None)
    ours = getattr(holding.module.config, setting, None)
    if theirs is not None and ours is not None and theirs != ours:
        detail = (
            f"cannot use {model.name!r} with {checkpoint.model.name!r}: "
            f"its {setting} is {ours}, right would be {theirs}"
        )
        raise Refusal("incompatible_model", detail, field)


def _safety_checker(request: Generate, library: Library) -> Holding | None:
    match request.safety_checker:
        case False:
            return None
        case True:
            return library.safety_checker(own_safety_checker(request.checkpoint))
        case Model() as model:
            return library.safety_checker(model)


def own_safety_checker(checkpoint: Model) -> Model:
    """The safety checker in a checkpoint's folder. Raises Refusal where there is none."""
    folder = Path(checkpoint.path) / "safety_checker"
    if not folder.is_dir():
        detail = f"cannot check pictures: {checkpoint.name!r} comes without a safety checker"
        raise Refusal("invalid_request", detail, "safety_checker")
    return Model(name=f"{checkpoint.name}/safety_checker", path=str(folder))
