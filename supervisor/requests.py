"""The bodies that callers send, and what follows from them before any file is looked at.

Pure. Decoding raises Problem with the field's path; client JSON is decoded on the
main thread at the default recursion limit, after the body's size is known.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ipc.messages import Call, OutputFormat
from supervisor.errors import Problem
from supervisor.parameter_checks import PROMPTS

DRAWN_SEEDS = 2**32

Name = Annotated[str, Meta(min_length=1, max_length=500)]
Scale = Annotated[float, Meta(ge=-100, le=100)]
# A `$` alone would let a line break follow; `\Z` is not known to other languages' patterns.
BatchId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$(?!\n)")]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's JSON body."""


class LoraChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Name
    scale: Scale = 1.0


class GenerateBody(Body, frozen=True, kw_only=True):
    """What to generate and how to answer."""

    checkpoint: Name | None = None
    pipeline: Name | None = None
    parameters: dict[str, Any] = {}
    vae: Name | None = None
    control_model: Name | Annotated[list[Name], Meta(min_length=1, max_length=8)] | None = None
    loras: Annotated[list[LoraChoice], Meta(max_length=16)] = []
    scheduler: Name | None = None
    a1111_scheduler: Name | None = None
    refiner_model: Name | None = None
    refiner_parameters: dict[str, Any] = {}
    safety_checker: bool | None = None
    batch_id: BatchId | None = None
    return_images: bool = True
    store_images: bool = False
    output_format: OutputFormat = "jpeg"
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    metadata: bool = True
    previews: Annotated[int, Meta(ge=0, le=100)] = 0
    deterministic: bool = False
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    timeout_seconds: Annotated[float, Meta(gt=0, le=86400)] | None = None

    @property
    def control_models(self) -> list[str]:
        if self.control_model is None:
            return []
        return [self.control_model] if isinstance(self.control_model, str) else self.control_model


class LoadBody(Body, frozen=True, kw_only=True):
    checkpoint: Name
    vae: Name | None = None
    worker: Annotated[int, Meta(ge=0, le=1000)] | str | None = None


class UnloadBody(Body, frozen=True, kw_only=True):
    checkpoint: Name
    worker: Annotated[int, Meta(ge=0, le=1000)] | str | None = None


BodyType = TypeVar("BodyType", bound=Body)


def decode(body: bytes, kind: type[BodyType]) -> BodyType:
    """Raises Problem: what is wrong with the body, and where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(error) from None


def invalid(error: Exception, prefix: str = "") -> Problem:
    """A decoding error as a problem that names its field."""
    if isinstance(error, RecursionError):
        return Problem("invalid_request", "cannot read the body: it is nested too deeply")
    text, _, path = str(error).partition(" - at `")
    path = path.rstrip("`").lstrip("$").replace("[...]", "")  # what msgspec says of a dict's values
    field = (prefix + path.strip(".")).strip(".") or None
    unknown = re.search(r"unknown field `([^`]{1,100})`", text)
    if unknown:
        field = f"{field}.{unknown[1]}" if field else unknown[1]
        return Problem("invalid_request", f"cannot accept the field {field}: it is not known",
                       field=field)  # fmt: skip
    where = f"cannot accept {field}: " if field else "cannot read the body: "
    return Problem("invalid_request", where + text[:300], field=field)


def expand(parameters: dict[str, Any], draw: Callable[[int], int]) -> list[Call]:
    """One call per picture: every prompt times pictures per prompt, in order, with seeds.

    Takes `seed`, `num_images_per_prompt` and lists of texts out of `parameters`, which
    the catalogue has checked; `draw(n)` gives a random number below n.
    """
    each = parameters.pop("num_images_per_prompt", None) or 1
    prompts = {name: parameters.pop(name) for name in PROMPTS if isinstance(
        parameters.get(name), list)}  # fmt: skip
    rows = max(map(len, prompts.values()), default=1)
    seeds = decide_seeds(parameters.pop("seed", None), rows * each, draw)
    return [
        Call(seed=seed, parameters={name: texts[i // each] for name, texts in prompts.items()})
        for i, seed in enumerate(seeds)
    ]


def decide_seeds(seed: int | list[int] | None, count: int, draw: Callable[[int], int]) -> list[int]:
    """One seed per picture: consecutive ones, or the caller's list as it is."""
    if isinstance(seed, list):
        return [draw(DRAWN_SEEDS) if one == -1 else one for one in seed]
    first = draw(DRAWN_SEEDS) if seed is None or seed == -1 else seed
    return list(range(first, first + count))
