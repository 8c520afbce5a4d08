"""Sidecars: the small JSON files by which an operator tells what a model's file cannot.

`<name>.json` beside a single file, `igi.json` inside a folder. Pure.
"""

from typing import Annotated, Any, Literal

import msgspec

from ipc.messages import Family
from supervisor.headers import InvalidModel

MAX_SIDECAR_BYTES = 2**16

Side = Annotated[int, msgspec.Meta(ge=8, le=16384, multiple_of=8)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it may set: the model's family and prediction type, and default parameters."""

    family: Family | msgspec.UnsetType = msgspec.UNSET
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    num_inference_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=100)] | msgspec.UnsetType = msgspec.UNSET
    guidance_rescale: Fraction | msgspec.UnsetType = msgspec.UNSET
    eta: Fraction | msgspec.UnsetType = msgspec.UNSET
    strength: Fraction | msgspec.UnsetType = msgspec.UNSET
    width: Side | msgspec.UnsetType = msgspec.UNSET
    height: Side | msgspec.UnsetType = msgspec.UNSET
    clip_skip: Annotated[int, msgspec.Meta(ge=0, le=24)] | msgspec.UnsetType = msgspec.UNSET
    negative_prompt: str | msgspec.UnsetType = msgspec.UNSET
    scheduler: str | msgspec.UnsetType = msgspec.UNSET
    a1111_scheduler: str | msgspec.UnsetType = msgspec.UNSET

    def defaults(self) -> dict[str, Any]:
        """The default parameters that were set, `scheduler` and `a1111_scheduler` among them."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return {name: told[name] for name in told if name not in ("family", "prediction_type")}


def read_sidecar(text: bytes, name: str) -> Sidecar:
    """Raises InvalidModel naming the sidecar and the field that is wrong."""
    try:
        return msgspec.json.decode(text, type=Sidecar)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, msgspec.MsgspecError) else "not JSON"
        raise InvalidModel(f"its sidecar {name} is not right: {reason}") from None
