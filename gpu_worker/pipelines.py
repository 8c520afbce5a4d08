"""A request's models and parameters as calls of stock Diffusers pipelines, ready to run.

Each picture is a call of its own, on a pipeline and schedulers of its own that share
the checkpoint's modules: nothing that a call keeps on its pipeline meets another call.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

from gpu_worker import images, prompts, schedulers
from gpu_worker.failures import Refusal, RequestRefused
from gpu_worker.holdings import Holding
from gpu_worker.models import Models
from gpu_worker.steps import Bar, Watch
from gpu_worker.transfer import OnDevice, stay_on_device
from ipc.messages import Call, Generate, Model, Scheduler

REFINER_PIPELINE = "StableDiffusionXLImg2ImgPipeline"
# What a refiner does not take over from the base's parameters.
NOT_REFINED = frozenset({"image", "mask_image", "strength", "denoising_start", "denoising_end"})
# What a pipeline raises about its arguments.
COMPLAINTS = (TypeError, ValueError, ArithmeticError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Result:
    picture: Image.Image | OnDevice
    nsfw: bool | None


@dataclass
class Part:
    """One call of one pipeline."""

    pipeline: Any
    arguments: dict[str, Any]

    def run(self, watch: Watch, **more: Any) -> Any:
        """The pipeline's output. Raises RequestRefused before its first step, and JobCancelled."""
        bar = Bar(watch)
        for pipeline in (self.pipeline, *_within(self.pipeline)):
            pipeline.progress_bar = bar.opened
        if "callback_on_step_end" in call_parameters(type(self.pipeline)):
            more["callback_on_step_end"] = bar.step_ended
        try:
            with AttentionRestored(self.pipeline):
                return self.pipeline(**prompts.encode(self.pipeline, self.arguments | more))
        except COMPLAINTS as error:
            if bar.begun:
                raise
            raise RequestRefused(type(self.pipeline).__name__, error) from error


@dataclass
class PreparedCall:
    """One picture to be made; `run` may be called once, from any thread or greenlet."""

    index: int
    call: Call
    base: Part
    refiner: Part | None = None
    safety_checker: Holding | None = None
    """Set where the pipeline itself does not check."""

    def run(self, watch: Watch) -> Result:
        """Raises what Part.run raises, and whatever else the pipeline raises."""
        last = self.base if self.refiner is None else self.refiner
        if self.safety_checker is None and not last.arguments.get("padding_mask_crop"):
            stay_on_device(last.pipeline)
        output = self.base.run(watch)
        if self.refiner is not None:
            output = self.refiner.run(watch, image=output.images)
        flags = getattr(output, "nsfw_content_detected", None)
        picture, nsfw = output.images[0], bool(flags[0]) if flags else None
        if self.safety_checker is not None:
            return checked(picture, self.safety_checker)
        return Result(picture, nsfw)


def prepare(request: Generate, models: Models) -> list[PreparedCall]:
    """One call per picture, in order. Raises Refusal for what does not fit together."""
    kind = pipeline_class(request.pipeline)
    pictures = decoded_images(request.images)
    checks_itself = "safety_checker" in inspect.signature(kind.__init__).parameters
    return [
        PreparedCall(
            index,
            call,
            _base(kind, request, call, models, pictures),
            _refinement(request, call, models),
            None if checks_itself else models.safety_checker,
        )
        for index, call in enumerate(request.calls)
    ]


def pipeline_class(name: str) -> type[Any]:
    """A pipeline class of Diffusers by name. Raises Refusal."""
    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
        return kind
    raise Refusal(
        "invalid_request", f"cannot run {name}: Diffusers has no such pipeline", "pipeline"
    )


def call_parameters(kind: type[Any]) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes, by name."""
    return inspect.signature(kind.__call__).parameters


def decoded_images(given: dict[str, list[bytes]]) -> dict[str, Any]:
    """Pictures by parameter name: one as itself, several as a list."""
    pictures = {
        name: [images.decoded(data, f"parameters.{name}") for data in encoded]
        for name, encoded in given.items()
    }
    return {name: each[0] if len(each) == 1 else each for name, each in pictures.items()}


def arguments(kind: type[Any], given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The arguments of one call that makes one picture. Raises Refusal for strange names."""
    accepted = call_parameters(kind)
    strange = sorted(set(given) - set(accepted))
    if strange:
        detail = f"cannot run {kind.__name__}: it takes no {strange[0]}"
        raise Refusal("invalid_request", detail, f"parameters.{strange[0]}")
    fixed = {
        "num_images_per_prompt": 1,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "pil",
    }
    taken = {name: value for name, value in fixed.items() if name in accepted}
    return {name: _as_tuple(accepted[name], value) for name, value in given.items()} | taken


def _as_tuple(parameter: inspect.Parameter, value: Any) -> Any:
    """SDXL's sizes must be tuples; JSON knows only lists."""
    annotation = str(parameter.annotation).lower()
    if isinstance(value, list) and "tuple[" in annotation and "list[" not in annotation:
        return tuple(value)
    return value


def built(kind: type[Any], checkpoint: Model, parts: Mapping[str, Any]) -> Any:
    """A pipeline of the parts that its constructor takes. Raises Refusal where some are missing."""
    chosen: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if name in parts:
            chosen[name] = parts[name]
        elif name in kind._optional_components:
            chosen[name] = None
        elif name == "controlnet":
            detail = f"cannot run {kind.__name__} without a control_model"
            raise Refusal("invalid_request", detail, "control_model")
        elif parameter.default is inspect.Parameter.empty:
            detail = f"cannot run {kind.__name__} on {checkpoint.name!r}: it has no {name}"
            raise Refusal("incompatible_model", detail, "checkpoint")
    try:
        # A class can be hashed, which mypy does not know of type[Any].
        return settled(kind, device_of(chosen.values()))(**chosen)  # type: ignore[arg-type]
    except COMPLAINTS as error:
        detail = f"cannot run {kind.__name__} on {checkpoint.name!r}: its parts do not fit"
        raise Refusal("incompatible_model", detail, "checkpoint") from error


@functools.cache
def settled(kind: type[Any], device: torch.device) -> type[Any]:
    """The pipeline class, with its modules on this device for good.

    Stock pipelines look for hooks of offloading in all of their modules whenever a call begins:
    4 of the 6 ms that SD1.5's takes to its first forward.
    """
    return type(kind.__name__, (kind,), {"_execution_device": device})


def device_of(parts: Iterable[Any]) -> torch.device:
    """That of the first module, as all share it."""
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    weights = (weight for module in modules for weight in module.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))


def fresh_schedulers(
    parts: Mapping[str, Any], wanted: Scheduler | None, seed: int
) -> dict[str, Any]:
    """A call's own schedulers, the wanted one among them. Raises Refusal."""
    if wanted is not None and not isinstance(parts.get("scheduler"), SchedulerMixin):
        detail = "cannot choose a scheduler: this checkpoint uses none"
        raise Refusal("invalid_request", detail, "scheduler")
    try:
        fresh = {
            name: schedulers.build(own, wanted if name == "scheduler" else None, seed)
            for name, own in parts.items()
            if isinstance(own, SchedulerMixin)
        }
    except schedulers.SchedulerError as error:
        raise Refusal(error.code, str(error), error.field) from error
    # Not its subclasses: DreamLite's are given timesteps as vectors, which nobody moves.
    if "scheduler" in fresh and type(parts.get("unet")) is diffusers.UNet2DConditionModel:
        schedulers.timed_on_host(fresh["scheduler"])
    return fresh


def checked(picture: Image.Image, safety_checker: Holding) -> Result:
    """A finished picture, black where the safety checker objects to it."""
    checker = safety_checker.module
    extractor = safety_checker.parts["feature_extractor"]
    pixels = extractor([picture], return_tensors="pt").pixel_values
    blank = torch.zeros(1, 1)
    _, flags = checker(clip_input=pixels.to(checker.device, checker.dtype), images=blank)
    flagged = bool(flags[0])
    return Result(Image.new("RGB", picture.size) if flagged else picture, flagged)


def _base(
    kind: type[Any], request: Generate, call: Call, models: Models, pictures: dict[str, Any]
) -> Part:
    held = models.checkpoint.parts
    parts = held | _overrides(models) | fresh_schedulers(held, request.scheduler, call.seed)
    given = request.parameters | call.parameters | pictures
    taken = arguments(kind, given, call.seed)
    if models.refiner is not None and given.get("denoising_end") is not None:
        taken["output_type"] = "latent"
    return Part(built(kind, request.checkpoint, parts), taken)


def _overrides(models: Models) -> dict[str, Any]:
    """The parts that the request brings along."""
    parts: dict[str, Any] = {"safety_checker": None}
    if models.vae is not None:
        parts["vae"] = models.vae.module
    if models.controlnets:
        nets = [net.module for net in models.controlnets]
        parts["controlnet"] = nets[0] if len(nets) == 1 else nets
    if models.safety_checker is not None:
        parts["safety_checker"] = models.safety_checker.module
        parts["feature_extractor"] = models.safety_checker.parts["feature_extractor"]
    return parts


def _refinement(request: Generate, call: Call, models: Models) -> Part | None:
    """The refiner's call: what is not said for it is the base's. A new generator, the same seed."""
    if request.refiner is None or models.refiner is None:
        return None
    kind = pipeline_class(REFINER_PIPELINE)
    base = request.parameters | call.parameters
    accepted = call_parameters(kind)
    given = {name: base[name] for name in base if name in accepted and name not in NOT_REFINED}
    if base.get("denoising_end") is not None:
        given["denoising_start"] = base["denoising_end"]
    taken = arguments(kind, given | request.refiner.parameters, call.seed)
    held = models.refiner.parts
    parts = held | fresh_schedulers(held, request.scheduler, call.seed)
    return Part(built(kind, request.refiner.checkpoint, parts), taken)


def _within(pipeline: Any) -> list[Any]:
    """The pipelines that a combined pipeline is made of."""
    return [
        each for each in vars(pipeline).values() if isinstance(each, diffusers.DiffusionPipeline)
    ]


class AttentionRestored:
    """Puts attention processors back that a pipeline with PAG leaves replaced when it is ended."""

    def __init__(self, pipeline: Any) -> None:
        own = hasattr(pipeline, "set_pag_applied_layers")
        parts = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
        self._denoiser = next((each for each in parts if own and each is not None), None)

    def __enter__(self) -> None:
        if self._denoiser is not None:
            self._before = self._denoiser.attn_processors

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._denoiser is not None and kind is not None:
            self._denoiser.set_attn_processor(self._before)
