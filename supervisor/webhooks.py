"""Webhooks: what is told of an event, how it is signed, and what follows from an attempt.

Pure: time and chance are arguments. Signatures follow the Standard Webhooks rules
(https://www.standardwebhooks.com).
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple, assert_never

import msgspec
import pybase64

from supervisor.settings import Settings, SettingsError

LONGEST_RETRY_AFTER_SECONDS = 86_400.0

ModelEvent = Literal["model.loaded", "model.unloaded"]
ModelKind = Literal["checkpoint", "vae", "lora", "controlnet"]


# Payloads


def endpoint(settings: Settings, event: str) -> str | None:
    """The address that is told of an event; None: nobody is."""
    return {
        "model.loaded": settings.webhook_model_loaded,
        "model.unloaded": settings.webhook_model_unloaded,
        "image.generated": settings.webhook_image_generated,
        "image.stored": settings.webhook_image_stored,
    }[event]


def node_info(settings: Settings, system_stats: object) -> dict[str, object]:
    """`system_stats` is what /stats answers."""
    identity = {
        "salad_machine_id": settings.salad_machine_id,
        "salad_container_group_id": settings.salad_container_group_id,
    }
    return {"identity": identity, "system_stats": system_stats}


def model_event(
    event: ModelEvent, kind: ModelKind, name: str, worker: int, now: float, node: object
) -> bytes:
    """The body that tells of a model. `now` is in Unix seconds, `node` is `node_info(…)`."""
    return _body(event, now, node, {kind: name, "worker": worker})


def image_generated(
    batch_id: str,
    checkpoint: str,
    pipeline: str,
    seeds: Sequence[int],
    meta: object,
    now: float,
    node: object,
) -> bytes:
    """The body that tells of a batch. `meta` is the answer's own."""
    told = {"batch_id": batch_id, "checkpoint": checkpoint, "pipeline": pipeline}
    return _body("image.generated", now, node, told | {"seeds": seeds, "meta": meta})


def image_stored(image: str | bytes, batch_id: str, index: int, now: float, node: object) -> bytes:
    """The body that tells of a picture: the file's path, or its bytes, which go as base64.

    A picture takes some milliseconds to encode: call from a thread.
    """
    if isinstance(image, bytes):
        image = pybase64.b64encode_as_string(image)
    return _body("image.stored", now, node, {"image": image, "batch_id": batch_id, "index": index})


def _body(event: str, now: float, node: object, told: Mapping[str, object]) -> bytes:
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    whole = {"event": event, "timestamp": timestamp, **told, "node_info": node}
    return msgspec.json.encode(whole)


# Signatures


def signing_key(secret: str) -> bytes:
    """The key inside a `whsec_…` secret. Raises SettingsError."""
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise SettingsError(
            "cannot use WEBHOOK_SECRET: what follows whsec_ is not base64"
        ) from None


def signature(key: bytes, identifier: str, timestamp: int, body: bytes) -> str:
    """The webhook-signature header, scheme v1: HMAC-SHA256 over id.timestamp.body."""
    signed = f"{identifier}.{timestamp}.".encode() + body
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


# Decisions


class Answered(NamedTuple):
    status: int
    retry_after: str | None = None


class Unanswered(NamedTuple):
    reason: str


class Delivered(NamedTuple):
    pass


class Retry(NamedTuple):
    """`at` is in Unix seconds. An endpoint that asks for time gets it for all its events."""

    at: float
    reason: str
    all_events: bool = False


class Dead(NamedTuple):
    reason: str


def retry_after_seconds(header: str | None, now: float) -> float:
    """What a Retry-After header asks for: seconds or a date; 0 for none or nonsense."""
    if header is None:
        return 0.0
    seconds = 0.0
    if header.isascii() and header.strip().isdigit():
        seconds = float(header)
    else:
        with suppress(ValueError, OverflowError):
            seconds = parsedate_to_datetime(header).timestamp() - now
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)


def decide(
    result: Answered | Unanswered, now: float, pause: float | None
) -> Delivered | Retry | Dead:
    """What follows from an attempt; `pause` is what the schedule says, in seconds."""
    match result:
        case Answered(status) if 200 <= status < 300:
            return Delivered()
        case Answered(410):
            return Dead("answered 410")
        case Answered(status, retry_after):
            asked = retry_after_seconds(retry_after, now) if status in (429, 503) else 0.0
            if pause is None:
                return Dead(f"answered {status}")
            return Retry(now + max(pause, asked), f"answered {status}", asked > 0)
        case Unanswered(reason):
            return Dead(reason) if pause is None else Retry(now + pause, reason)
        case _:
            assert_never(result)
