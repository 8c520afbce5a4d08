"""Webhook payloads, signatures and decisions."""

import base64
import json
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from standardwebhooks import Webhook

from supervisor.settings import Settings, SettingsError
from supervisor.webhooks import (
    Answered,
    Dead,
    Delivered,
    Retry,
    Unanswered,
    decide,
    endpoint,
    image_generated,
    image_stored,
    model_event,
    node_info,
    retry_after_seconds,
    signature,
    signing_key,
)

NOON = datetime(2031, 5, 4, 12, tzinfo=UTC).timestamp()
NODE: dict[str, object] = {"identity": {}, "system_stats": {}}


def test_node_info_is_identity_and_system_stats() -> None:
    settings = Settings(salad_machine_id="machine")
    assert node_info(settings, {"cpu": {}}) == {
        "identity": {"salad_machine_id": "machine", "salad_container_group_id": None},
        "system_stats": {"cpu": {}},
    }


@pytest.mark.parametrize("event", ["model.loaded", "model.unloaded"])
@pytest.mark.parametrize("kind", ["checkpoint", "vae", "lora", "controlnet"])
def test_a_model_event_names_the_model_and_the_worker(event: str, kind: str) -> None:
    body = model_event(event, kind, "dreamshaper_8", 1, NOON, NODE)  # type: ignore[arg-type]
    assert json.loads(body) == {
        "event": event,
        "timestamp": "2031-05-04T12:00:00Z",
        kind: "dreamshaper_8",
        "worker": 1,
        "node_info": NODE,
    }


def test_image_generated_tells_of_the_batch() -> None:
    meta = {"total_time": 1.5}
    body = image_generated("b", "demo", "StableDiffusionPipeline", [7, 8], meta, NOON, NODE)
    assert json.loads(body) == {
        "event": "image.generated",
        "timestamp": "2031-05-04T12:00:00Z",
        "batch_id": "b",
        "checkpoint": "demo",
        "pipeline": "StableDiffusionPipeline",
        "seeds": [7, 8],
        "meta": meta,
        "node_info": NODE,
    }


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("/data/images/b-0.jpg", "/data/images/b-0.jpg"),
        (b"\xff\xd8\xff\x00", base64.b64encode(b"\xff\xd8\xff\x00").decode()),
    ],
)
def test_image_stored_has_the_path_or_the_picture(image: str | bytes, told: str) -> None:
    assert json.loads(image_stored(image, "b", 0, NOON, NODE)) == {
        "event": "image.stored",
        "timestamp": "2031-05-04T12:00:00Z",
        "image": told,
        "batch_id": "b",
        "index": 0,
        "node_info": NODE,
    }


def test_each_event_has_its_own_address() -> None:
    settings = Settings(
        webhook_model_loaded="http://a", webhook_model_unloaded="http://b",
        webhook_image_generated="http://c",
    )  # fmt: skip
    events = ("model.loaded", "model.unloaded", "image.generated", "image.stored")
    assert [endpoint(settings, event) for event in events] == [
        "http://a", "http://b", "http://c", None
    ]  # fmt: skip


def test_the_signature_is_what_standard_webhooks_verifies() -> None:
    secret = "whsec_" + base64.b64encode(bytes(range(24))).decode()
    now = int(datetime.now(UTC).timestamp())  # the verifier compares with its clock
    header = signature(signing_key(secret), "msg_1", now, b'{"a": "\xc3\xa9"}')
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(now), "webhook-signature": header}
    assert Webhook(secret).verify(b'{"a": "\xc3\xa9"}', headers) == {"a": "é"}


def test_a_secret_that_is_not_base64_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="cannot use WEBHOOK_SECRET"):
        signing_key("whsec_AAAAAAAAAAAAAAAAA")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("-5", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("²", 0.0),
        ("9" * 400, 86_400.0),
        (format_datetime(datetime.fromtimestamp(NOON + 90, UTC), usegmt=True), 90.0),
        (format_datetime(datetime.fromtimestamp(NOON - 90, UTC), usegmt=True), 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
    ],
)
def test_retry_after_is_seconds_or_a_date_within_reason(header: str | None, seconds: float) -> None:
    assert retry_after_seconds(header, NOON) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("result", "pause", "outcome"),
    [
        (Answered(200), 5.0, Delivered()),
        (Answered(204), None, Delivered()),
        (Answered(299), 5.0, Delivered()),
        (Answered(302), 5.0, Retry(105.0, "answered 302")),
        (Answered(400), 5.0, Retry(105.0, "answered 400")),
        (Answered(500), 5.0, Retry(105.0, "answered 500")),
        (Answered(500), None, Dead("answered 500")),
        (Answered(410), 5.0, Dead("answered 410")),
        (Answered(429, "60"), 5.0, Retry(160.0, "answered 429", True)),
        (Answered(503, "60"), 5.0, Retry(160.0, "answered 503", True)),
        (Answered(429, "2"), 5.0, Retry(105.0, "answered 429", True)),
        (Answered(429), 5.0, Retry(105.0, "answered 429")),
        (Answered(500, "60"), 5.0, Retry(105.0, "answered 500")),
        (Answered(429, "60"), None, Dead("answered 429")),
        (Unanswered("no answer"), 5.0, Retry(105.0, "no answer")),
        (Unanswered("no answer"), None, Dead("no answer")),
    ],
)
def test_what_follows_from_an_attempt(
    result: Answered | Unanswered, pause: float | None, outcome: object
) -> None:
    assert decide(result, 100.0, pause) == outcome
