"""From the catalogue's spelling of a type to a type that msgspec checks and documents.

`int`, `str | list[str] | None`, `tuple[int, int]`, `picture` (base64) become annotated types with
the bounds, the sentence and the default of their parameter. Pure: knows no pipeline.
"""

from __future__ import annotations

from types import GenericAlias
from typing import Annotated, Any, Union

from msgspec import UNSET, Meta

from supervisor.parameters import (
    MAX_IMAGES,
    MAX_PROMPT_CHARACTERS,
    MAX_STEPS,
    RULES,
    UNLISTED,
    Rule,
)


def field_type(name: str, kind: str, default: object) -> Any:
    """The annotated type of a parameter; `default` is documented only, `UNSET` for none."""
    rule = RULES.get(name, UNLISTED)
    members = tuple(_member(member, rule) for member in kind.split(" | "))
    extra = {} if default is UNSET else {"default": default}
    if "picture" in kind:
        extra["contentEncoding"] = "base64"
    meta = Meta(description=rule.sentence, extra_json_schema=extra)
    return Annotated[Union[members], meta]  # noqa: UP007 - built of values, not written


def _member(kind: str, rule: Rule) -> Any:
    """One member of a union, with bounds on every number and length."""
    outer, _, inner = kind.removesuffix("]").partition("[")
    match outer:
        case "list":
            longest = MAX_IMAGES if inner in ("str", "picture") else MAX_STEPS
            items = GenericAlias(list, (_member(inner, rule),))
            return Annotated[items, Meta(min_length=1, max_length=longest)]
        case "tuple":
            return GenericAlias(tuple, tuple(_member(item, rule) for item in inner.split(", ")))
        case "int":
            bounds = Meta(ge=int(rule.minimum), le=int(rule.maximum), multiple_of=rule.multiple_of)
            return Annotated[int, bounds]
        case "float":
            return Annotated[float, Meta(ge=rule.minimum, le=rule.maximum)]
        case "str":
            return Annotated[str, Meta(max_length=MAX_PROMPT_CHARACTERS)]
    return {"bool": bool, "picture": str, "None": None, "...": ...}[outer]
