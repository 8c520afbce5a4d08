"""The pipelines that are served and what each one takes; read from pipelines.json.

pipelines.json is written by scripts/make_catalogue from Diffusers' own signatures. This file
turns it into types that check a request and into JSON Schema for the OpenAPI document. Which of
the families a class fits, and which class follows from the inputs, is decided here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from supervisor.parameter_checks import check_all, refuse
from supervisor.parameter_types import field_type
from supervisor.parameters import OURS

FILE = Path(__file__).with_name("pipelines.json")

STABLE_DIFFUSION = ("sd15", "sd21")
SDXL = ("sdxl",)
SDXL_AND_REFINER = ("sdxl", "sdxl_refiner")
OTHER = ("other",)

# The refiner has no ControlNets, and nothing to start from but a picture.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION,
    "StableDiffusionControlNetPipeline": STABLE_DIFFUSION,
    "StableDiffusionControlNetImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionControlNetInpaintPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL_AND_REFINER,
    "StableDiffusionXLInpaintPipeline": SDXL_AND_REFINER,
    "StableDiffusionXLControlNetPipeline": SDXL,
    "StableDiffusionXLControlNetImg2ImgPipeline": SDXL,
    "StableDiffusionXLControlNetInpaintPipeline": SDXL,
}


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One parameter of a call, under the name that callers use.

    `type` is spelled as Python would, with `picture` for base64. `default` is the pipeline's own
    and unset where there is none. `call_name` is the call's name for it, empty where the same.
    """

    type: str
    default: Any = UNSET
    required: bool = False
    call_name: str = ""

    @property
    def is_picture(self) -> bool:
        return "picture" in self.type


class Pipeline(msgspec.Struct, frozen=True, dict=True):
    """One Diffusers class that is served."""

    name: str
    task: str
    families: tuple[str, ...]
    takes_controlnet: bool
    components: tuple[str, ...]
    optional_components: tuple[str, ...]
    parameters: Mapping[str, Parameter]

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """The parameters that are pictures, by the callers' names."""
        return tuple(name for name, item in self.parameters.items() if item.is_picture)

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """The pipeline's own defaults, of the parameters that have one."""
        items = self.parameters.items()
        return {name: item.default for name, item in items if item.default is not UNSET}

    @cached_property
    def call_names(self) -> Mapping[str, str]:
        """The callers' names -> the call's names; without what never reaches the call."""
        items = self.parameters.items()
        return {name: item.call_name or name for name, item in items if name not in OURS}


@cache
def picture_names() -> frozenset[str]:
    """What any pipeline calls the pictures that it takes."""
    return frozenset(name for each in pipelines().values() for name in each.pictures)


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A class as the file has it."""

    not_served: str = ""
    task: str = ""
    takes_controlnet: bool = False
    components: tuple[str, ...] = ()
    optional_components: tuple[str, ...] = ()
    parameters: dict[str, Parameter] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    diffusers: str
    pipelines: dict[str, _Entry]


@cache
def _file() -> _File:
    return msgspec.json.decode(FILE.read_bytes(), type=_File)


@cache
def pipelines() -> Mapping[str, Pipeline]:
    """Every pipeline that is served, by its class name."""
    ours = {name: Parameter(kind, default=_our_default(name)) for name, kind in OURS.items()}
    return MappingProxyType(
        {
            name: Pipeline(
                name=name,
                task=entry.task,
                families=FAMILIES.get(name, OTHER),
                takes_controlnet=entry.takes_controlnet,
                components=entry.components,
                optional_components=entry.optional_components,
                parameters=MappingProxyType(entry.parameters | ours),
            )
            for name, entry in _file().pipelines.items()
            if not entry.not_served
        }
    )


@cache
def not_served() -> Mapping[str, str]:
    """The classes of Diffusers that are not served -> the reason in words."""
    entries = _file().pipelines.items()
    return MappingProxyType({name: entry.not_served for name, entry in entries if entry.not_served})


def pipeline(name: str) -> Pipeline:
    """The pipeline of that name; `msgspec.ValidationError` says why there is none."""
    found = pipelines().get(name)
    if found is not None:
        return found
    reason = not_served().get(name, "the installed Diffusers has no such image pipeline")
    raise msgspec.ValidationError(f"Cannot serve {name[:100]}: {reason} - at `$.pipeline`")


def choose(family: str, given: set[str], controlnet: bool) -> str:
    """The class that follows from a checkpoint's family and the parameters given."""
    control = controlnet or "control_image" in given
    pictures = "Inpaint" if "mask_image" in given else "Img2Img" if "image" in given else ""
    if family == "sdxl_refiner":
        pictures = pictures or "Img2Img"
    prefix = "StableDiffusionXL" if family in SDXL_AND_REFINER else "StableDiffusion"
    name = f"{prefix}{'ControlNet' if control else ''}{pictures}Pipeline"
    if family in FAMILIES[name]:
        return name
    if family == "sdxl_refiner":
        raise msgspec.ValidationError("A refiner takes no ControlNet - at `$.control_model`")
    raise msgspec.ValidationError("Expected a pipeline for this checkpoint - at `$.pipeline`")


def read(
    name: str,
    raw: object,
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    max_pixels: int | None = None,
    control_models: int | None = None,
) -> dict[str, Any]:
    """The parameters of a request, checked; only those given, tuples where the call wants tuples.

    `raw` is what JSON decoding made of them; `defaults` are the checkpoint's own, looked at only
    for rules over several parameters. `msgspec.ValidationError` names the field, as in
    `$.parameters.width`.
    """
    known = pipeline(name).parameters
    unknown = [key for key in raw if key not in known] if isinstance(raw, Mapping) else []
    if unknown:
        takes = ", ".join(f"`{key}`" for key in sorted(known))
        refuse(f"{name} has no such parameter; it takes {takes}", str(unknown[0])[:100])
    body = msgspec.convert({"parameters": raw}, _body_type(name))
    values = msgspec.structs.asdict(body.parameters)
    given = {key: value for key, value in values.items() if value is not UNSET}
    check(name, {**defaults, **given}, max_pixels=max_pixels, control_models=control_models)
    return given


def check(
    name: str,
    parameters: Mapping[str, Any],
    *,
    max_pixels: int | None = None,
    control_models: int | None = None,
) -> None:
    """What types do not say: required parameters, and rules over several of them.

    `parameters` are those given over the checkpoint's own; the pipeline's defaults are added
    here. `control_models` is how many ControlNets come with them, None where that is not known.
    """
    chosen = pipeline(name)
    if control_models == 0 and chosen.takes_controlnet:
        raise msgspec.ValidationError(f"{name} needs a ControlNet - at `$.control_model`")
    if control_models and not chosen.takes_controlnet:
        raise msgspec.ValidationError(f"{name} takes no ControlNet - at `$.control_model`")
    for key, parameter in chosen.parameters.items():
        if parameter.required and parameters.get(key) is None:
            refuse(f"{name} needs `{key}`", key)
    # One union ControlNet takes several pictures, of several kinds.
    one_each = chosen.takes_controlnet and "Union" not in name
    check_all(
        {**chosen.defaults, **parameters},
        max_pixels=max_pixels,
        control_models=control_models if one_each else None,
    )


@cache
def parameters_type(name: str) -> type[msgspec.Struct]:
    """A struct of the pipeline's parameters; what is not given is `UNSET`, and null is null."""
    fields = [
        (key, field_type(key, item.type, item.default) | UnsetType, UNSET)
        for key, item in pipeline(name).parameters.items()
    ]
    return msgspec.defstruct(
        f"{name}Parameters", fields, kw_only=True, frozen=True, forbid_unknown_fields=True
    )


def parameters_schema(name: str) -> dict[str, Any]:
    """JSON Schema of the parameters, with a sentence and the pipeline's own default for each."""
    schema = msgspec.json.schema(parameters_type(name))
    inner: dict[str, Any] = schema["$defs"][f"{name}Parameters"]
    items = pipeline(name).parameters.items()
    return inner | {"required": [key for key, parameter in items if parameter.required]}


@cache
def _body_type(name: str) -> type[Any]:
    """Around the parameters, so that msgspec's own messages say `$.parameters.…`."""
    return msgspec.defstruct("Body", [("parameters", parameters_type(name))])


def _our_default(name: str) -> object:
    return 1 if name == "num_images_per_prompt" else None
