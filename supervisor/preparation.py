"""From a request's body to a job's message: names to files, base64 to bytes, seeds drawn.

Reads files and decodes base64, so it runs in a thread, but for requests without pictures
whose models were looked at a moment ago. Raises Problem.
"""

import random
from functools import cached_property
from typing import Any

import msgspec

from ipc import messages
from supervisor import catalogue, infotext, pictures, schedulers
from supervisor.errors import Problem
from supervisor.models import Models, NotAtHand, ResolvedModel
from supervisor.parameter_checks import PROMPTS
from supervisor.requests import GenerateBody, expand, invalid
from supervisor.settings import Settings

REFINER_PIPELINE = "StableDiffusionXLImg2ImgPipeline"
NOT_REFINED = ("strength", "denoising_start", "denoising_end")
"""Parameters that a refiner does not take over from its base."""
_random = random.SystemRandom()


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A message for the workers, and the request as it was understood."""

    message: messages.Generate
    inputs: dict[str, Any]
    seeds: list[int]


def unprepared(body: GenerateBody, job_id: str) -> Prepared:
    """What stands for a request while its models are still being downloaded."""
    checkpoint = messages.Model(name=body.checkpoint or "", path="")
    message = messages.Generate(
        job=job_id, pipeline=body.pipeline or "", checkpoint=checkpoint, calls=[]
    )
    return Prepared(message=message, inputs={}, seeds=[])


class Preparation:
    """Knows the models and the settings that requests are measured against."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self._settings = settings
        self._models = models

    def at_once(self, body: GenerateBody, job_id: str) -> Prepared | None:
        """Without blocking; None where pictures must be decoded or files looked at."""
        if catalogue.picture_names() & body.parameters.keys():
            return None
        try:
            return self._at_hand.prepare(body, job_id)
        except NotAtHand:
            return None

    @cached_property
    def _at_hand(self) -> "Preparation":
        return Preparation(self._settings, self._models.at_hand())

    def prepare(self, body: GenerateBody, job_id: str) -> Prepared:
        checkpoint = self._checkpoint(body.checkpoint)
        pipeline = self._pipeline(body, checkpoint)
        given = self._parameters(body, pipeline, checkpoint)
        images = self._images(pipeline, given)
        others = self._others(body, checkpoint)
        refiner = self._refiner(body, checkpoint, given)
        call_names = catalogue.pipeline(pipeline).call_names
        calls = expand(given, _random.randrange)
        message = messages.Generate(
            job=job_id,
            pipeline=pipeline,
            checkpoint=checkpoint.model,
            calls=calls,
            parameters={call_names.get(name, name): value for name, value in given.items()},
            images=images,
            refiner=refiner,
            scheduler=self._scheduler(body, checkpoint),
            safety_checker=self._safety_checker(body, checkpoint),
            output_format=body.output_format,
            output_quality=_quality(body),
            previews=body.previews,
            deterministic=body.deterministic,
            priority=body.priority,
            **others,
        )
        inputs = _inputs(body, message, given, [call.seed for call in calls])
        if body.metadata:
            message = _with_texts(message, inputs, checkpoint)
        return Prepared(message=message, inputs=inputs, seeds=[call.seed for call in calls])

    def load(self, name: str, vae: str | None, job_id: str) -> messages.Load:
        checkpoint = self._models.resolve("checkpoint", name)
        chosen = self._models.resolve("vae", vae, checkpoint) if vae else None
        if chosen:
            self._models.check_fit(checkpoint, [chosen])
        return messages.Load(
            job=job_id, checkpoint=checkpoint.model, vae=chosen.model if chosen else None
        )

    def unload(self, name: str, job_id: str) -> messages.Unload:
        """Downloads nothing: what is not on this host is not loaded either."""
        local = Models(self._settings)
        return messages.Unload(job=job_id, checkpoint=local.resolve("checkpoint", name).model)

    def _checkpoint(self, name: str | None) -> ResolvedModel:
        chosen = name or self._settings.launch_checkpoint
        if chosen:
            return self._models.resolve("checkpoint", chosen)
        if self._models.has_demo():
            return self._models.resolve("checkpoint", "demo")
        detail = "cannot choose a checkpoint: name one, there is no default"
        raise Problem("invalid_request", detail, field="checkpoint")

    def _pipeline(self, body: GenerateBody, checkpoint: ResolvedModel) -> str:
        try:
            name = body.pipeline or self._chosen_pipeline(body, checkpoint)
            pipeline = catalogue.pipeline(name)
        except msgspec.ValidationError as error:
            raise invalid(error) from None
        family = checkpoint.model.family
        if family not in pipeline.families:
            fitting = " or ".join(pipeline.families)
            detail = (f"cannot run {name} on {checkpoint.model.name}: it is {family}, "
                      f"and this pipeline takes {fitting}")  # fmt: skip
            raise Problem("incompatible_model", detail, field="pipeline")
        return name

    def _chosen_pipeline(self, body: GenerateBody, checkpoint: ResolvedModel) -> str:
        if checkpoint.model.family == "other" and checkpoint.class_name:
            return checkpoint.class_name
        given = {name for name, value in body.parameters.items() if value is not None}
        return catalogue.choose(checkpoint.model.family, given, bool(body.control_models))

    def _parameters(
        self, body: GenerateBody, pipeline: str, checkpoint: ResolvedModel
    ) -> dict[str, Any]:
        """What was given, over the checkpoint's own defaults; null counts as left out."""
        known = catalogue.pipeline(pipeline).parameters
        defaults = {name: v for name, v in checkpoint.defaults.items() if name in known}
        try:
            given = catalogue.read(
                pipeline,
                body.parameters,
                defaults=defaults,
                max_pixels=self._settings.max_image_pixels,
                control_models=len(body.control_models),
            )
        except (msgspec.ValidationError, RecursionError) as error:
            raise invalid(error) from None
        return defaults | {name: value for name, value in given.items() if value is not None}

    def _images(self, pipeline: str, given: dict[str, Any]) -> dict[str, list[bytes]]:
        """Takes the pictures out of the parameters; by the call's own names."""
        names = [name for name in catalogue.pipeline(pipeline).pictures if name in given]
        decoded = pictures.decode_all(
            {name: given.pop(name) for name in names}, self._settings.max_image_pixels
        )
        call_names = catalogue.pipeline(pipeline).call_names
        return {call_names[name]: data for name, data in decoded.items()}

    def _others(self, body: GenerateBody, checkpoint: ResolvedModel) -> dict[str, Any]:
        """The models beside the checkpoint, each checked against it."""
        vae_name = body.vae or self._launch_vae(body)
        vae = self._models.resolve("vae", vae_name, checkpoint) if vae_name else None
        controlnets = [
            self._models.resolve("controlnet", name, checkpoint) for name in body.control_models
        ]
        loras = [self._models.resolve("lora", choice.model) for choice in body.loras]
        fitting = [*([vae] if vae else []), *controlnets, *loras]
        self._models.check_fit(checkpoint, fitting)
        return {
            "vae": vae.model if vae else None,
            "controlnets": [net.model for net in controlnets],
            "loras": [
                messages.Lora(model=lora.model, scale=choice.scale)
                for lora, choice in zip(loras, body.loras, strict=True)
            ],
        }

    def _launch_vae(self, body: GenerateBody) -> str | None:
        """LAUNCH_VAE goes with LAUNCH_CHECKPOINT, wherever that is used."""
        launched = self._settings.launch_checkpoint
        return self._settings.launch_vae if body.checkpoint in (None, launched) else None

    def _refiner(
        self, body: GenerateBody, checkpoint: ResolvedModel, given: dict[str, Any]
    ) -> messages.Refiner | None:
        """`given` are the base's parameters without its pictures."""
        if body.refiner_model is None:
            if body.refiner_parameters:
                raise Problem("invalid_request", "cannot use refiner_parameters without a "
                              "refiner_model", field="refiner_parameters")  # fmt: skip
            return None
        refiner = self._models.resolve("checkpoint", body.refiner_model, field="refiner_model")
        if checkpoint.model.family != "sdxl" or refiner.model.family != "sdxl_refiner":
            detail = (f"cannot refine {checkpoint.model.name} ({checkpoint.model.family}) with "
                      f"{refiner.model.name} ({refiner.model.family}): an sdxl checkpoint takes "
                      "an sdxl_refiner")  # fmt: skip
            raise Problem("incompatible_model", detail, field="refiner_model")
        parameters = _refiner_parameters(body, given)
        return messages.Refiner(checkpoint=refiner.model, parameters=parameters)

    def _scheduler(
        self, body: GenerateBody, checkpoint: ResolvedModel
    ) -> messages.Scheduler | None:
        if body.scheduler and body.a1111_scheduler:
            raise Problem("invalid_request", "cannot use both scheduler and a1111_scheduler: "
                          "name one", field="a1111_scheduler")  # fmt: skip
        if body.a1111_scheduler:
            return schedulers.by_a1111_name(body.a1111_scheduler)
        if body.scheduler:
            return schedulers.by_class_name(body.scheduler)
        if "a1111_scheduler" in checkpoint.defaults:
            return schedulers.by_a1111_name(checkpoint.defaults["a1111_scheduler"])
        default = checkpoint.defaults.get("scheduler")
        return schedulers.by_class_name(default) if default else None

    def _safety_checker(
        self, body: GenerateBody, checkpoint: ResolvedModel
    ) -> messages.Model | bool:
        wanted = body.safety_checker
        if not (self._settings.load_safety_checker if wanted is None else wanted):
            return False
        return self._models.safety_checker(checkpoint)


def _refiner_parameters(body: GenerateBody, base: dict[str, Any]) -> dict[str, Any]:
    """What is said for the refiner, checked together with what it takes over from the base."""
    own = body.refiner_parameters
    for name in ("image", "seed", "num_images_per_prompt"):
        if name in own:
            raise _not_refined(name, "it is the base's own")
    for name in PROMPTS:
        if isinstance(own.get(name), list):
            raise _not_refined(name, "it is one text, for all pictures")
    taken = {name: v for name, v in base.items() if name not in NOT_REFINED}
    taken["denoising_start"] = base.get("denoising_end")
    try:
        given = catalogue.read(REFINER_PIPELINE, {"image": "-", **own}, defaults=taken)
    except (msgspec.ValidationError, RecursionError) as error:
        problem = invalid(error)
        detail = problem.detail.replace("parameters", "refiner_parameters", 1)
        field = (problem.field or "").replace("parameters", "refiner_parameters", 1)
        raise Problem(problem.code, detail, field=field or None) from None
    return {name: v for name, v in given.items() if v is not None and name != "image"}


def _not_refined(name: str, reason: str) -> Problem:
    field = f"refiner_parameters.{name}"
    return Problem("invalid_request", f"cannot accept {field}: {reason}", field=field)


def _quality(body: GenerateBody) -> int | None:
    """The files' quality, by OpenAI's name for it: the higher, the better."""
    if body.output_compression is not None and body.output_format == "png":
        detail = "cannot accept output_compression: a png loses nothing; ask for jpeg or webp"
        raise Problem("invalid_request", detail, field="output_compression")
    return body.output_compression


def _with_texts(
    message: messages.Generate, inputs: dict[str, Any], checkpoint: ResolvedModel
) -> messages.Generate:
    """With what each picture's file is to say of how it was made."""
    scheduler = message.scheduler.class_name if message.scheduler else checkpoint.scheduler
    calls = [
        msgspec.structs.replace(call, metadata=infotext.texts(inputs, call, scheduler))
        for call in message.calls
    ]
    return msgspec.structs.replace(message, calls=calls)


def _inputs(
    body: GenerateBody, message: messages.Generate, given: dict[str, Any], seeds: list[int]
) -> dict[str, Any]:
    """The request as understood: seeds filled in, pictures left out."""
    pictures_given = catalogue.pipeline(message.pipeline).pictures
    texts = {
        name: value
        for name, value in body.parameters.items()
        if name not in pictures_given and value is not None
    }
    inputs: dict[str, Any] = msgspec.to_builtins(body)
    return inputs | {
        "checkpoint": message.checkpoint.name,
        "pipeline": message.pipeline,
        "vae": message.vae.name if message.vae else None,
        "parameters": given | texts | {"seed": seeds[0]},
    }


def model_paths(message: messages.Generate | messages.Load | messages.Unload) -> set[str]:
    """The files and folders that a job needs."""
    if not isinstance(message, messages.Generate):
        return {message.checkpoint.path}
    models = [message.checkpoint, *message.controlnets, *(lora.model for lora in message.loras)]
    models += [message.vae] if message.vae else []
    models += [message.refiner.checkpoint] if message.refiner else []
    return {model.path for model in models}
