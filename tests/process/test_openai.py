"""OpenAI's own Python client against the server: what it understands is what is right."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.tools.raw_http import Connection, head
from tests.tools.server import RunningServer, wait_until


@pytest.fixture(scope="module")
def client(scripted: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def colour(answer: openai.types.ImagesResponse) -> Any:
    """Of the first picture; a scripted worker's follows from the seed."""
    return opened((answer.data or [])[0].b64_json).getpixel((0, 0))


def png(size: tuple[int, int] = (64, 64), colour: Any = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def clear_mask(size: tuple[int, int] = (64, 64)) -> bytes:
    return png(size, (0, 0, 0, 0), "RGBA")


def test_a_prompt_becomes_a_png(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", model="sd15", size="64x128")
    assert answer.data is not None
    [image] = answer.data
    picture = opened(image.b64_json)
    assert (picture.format, picture.size) == ("PNG", (64, 128))
    assert answer.created > 1_600_000_000


def test_n_pictures_have_seeds_that_count_up(client: openai.OpenAI) -> None:
    def colours(**more: Any) -> list[Any]:
        answer = client.images.generate(prompt="a fox", model="sd15", **more)
        return [opened(image.b64_json).getpixel((0, 0)) for image in answer.data or ()]

    both = colours(n=2, extra_body={"seed": 7})
    assert both == [*colours(extra_body={"seed": 7}), *colours(extra_body={"seed": 8})]
    assert both[0] != both[1]


@pytest.mark.parametrize("output_format", ["jpeg", "webp", "png"])
def test_the_format_is_the_one_asked_for(client: openai.OpenAI, output_format: Any) -> None:
    answer = client.images.generate(
        prompt="a fox", model="sd15", output_format=output_format, output_compression=100
    )
    assert answer.output_format == output_format
    assert opened((answer.data or [])[0].b64_json).format == output_format.upper()


def test_an_address_leads_to_the_stored_picture(
    client: openai.OpenAI, scripted: RunningServer
) -> None:
    answer = client.images.generate(prompt="a fox", model="sd15", response_format="url")
    url = (answer.data or [])[0].url
    assert url is not None
    assert url.startswith(f"{scripted.url}/images/")
    stored = scripted.client.get(url)
    assert stored.headers["content-type"] == "image/png"


def test_what_clients_always_send_is_accepted(client: openai.OpenAI) -> None:
    client.images.generate(
        prompt="a fox", model="sd15", quality="hd", background="opaque", user="somebody",
        size="auto", n=1, response_format="b64_json",
    )  # fmt: skip


def test_our_own_fields_are_extensions(client: openai.OpenAI, scripted: RunningServer) -> None:
    extra = {
        "negative_prompt": "blurry",
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "seed": 5,
        "loras": [],
        "scheduler": "EulerDiscreteScheduler",
    }
    first = client.images.generate(prompt="a fox", model="sd15", extra_body=extra)
    again = client.images.generate(prompt="a fox", model="sd15", extra_body=extra)
    assert colour(first) == colour(again)


def test_streams_bring_partial_pictures_and_then_the_whole(client: openai.OpenAI) -> None:
    with client.images.generate(
        prompt="a fox", model="sd15", stream=True, partial_images=2, size="64x64", n=2
    ) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert kinds == [partial] * 4 + [completed] * 2
    for index, event in enumerate(events):
        if event.type == "image_generation.partial_image":
            assert event.partial_image_index == index
            assert opened(event.b64_json).format == "JPEG" == event.output_format.upper()
        else:
            assert opened(event.b64_json).size == (64, 64)
            assert (event.size, event.output_format) == ("64x64", "png")
            assert event.usage.total_tokens == 0


def test_an_edit_starts_from_the_picture(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=png(), prompt="a fox", model="sd15", n=2)
    assert len(answer.data or ()) == 2


def test_an_edit_with_a_mask_draws_at_the_pictures_size(client: openai.OpenAI) -> None:
    answer = client.images.edit(
        image=png((96, 68)), mask=clear_mask((96, 68)), prompt="a fox", model="sd15"
    )
    assert opened((answer.data or [])[0].b64_json).size == (96, 64)


def test_an_edit_takes_extensions_as_text(client: openai.OpenAI) -> None:
    edited = client.images.edit(
        image=("a.png", png(), "image/png"), prompt="a fox", model="sd15", size="128x128",
        extra_body={"seed": 3, "strength": 0.5, "loras": json.dumps([])},
    )  # fmt: skip
    drawn = client.images.generate(prompt="a fox", model="sd15", extra_body={"seed": 3})
    assert colour(edited) == colour(drawn)


def test_an_edit_streams_under_its_own_names(client: openai.OpenAI) -> None:
    with client.images.edit(
        image=[png()], prompt="a fox", model="sd15", stream=True, partial_images=1
    ) as stream:
        kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


def test_checkpoints_are_models(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert "sd15" in ids
    assert client.models.retrieve("sd15").object == "model"


def test_an_id_may_hold_slashes(client: openai.OpenAI) -> None:
    name = "some/group/nested"
    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).id == name
    assert client.images.generate(prompt="a fox", model=name).data


def refused(call: Any, **arguments: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call(**{"prompt": "a fox", "model": "sd15", **arguments})
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"size": "64by64"}, "size"),
        ({"size": "60x64"}, "size"),
        ({"size": "16384x16384"}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"quality": "best"}, "quality"),
        ({"extra_body": {"style": "vivid"}}, "style"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"seed": -5}}, "seed"),
        ({"extra_body": {"scheduler": "Nothing"}}, "scheduler"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_a_wrong_field_is_named_in_openais_form(
    client: openai.OpenAI, arguments: dict[str, Any], param: str
) -> None:
    error = refused(client.images.generate, **arguments)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert error.code in ("invalid_request", "not_supported")
    assert param in error.message
    assert "parameters." not in error.message


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    error = refused(client.images.generate, model="gpt-image-1")
    assert isinstance(error, openai.NotFoundError)
    assert (error.param, error.code) == ("model", "unknown_model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../sd15")


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"image": b"not a picture"}, "image"),
        ({"image": png()[:60]}, "image"),
        ({"image": [png(), png()]}, "image"),
        ({"image": png(), "mask": clear_mask((32, 64))}, "mask"),
        ({"image": png(), "mask": b"no"}, "mask"),
        ({"image": png(), "size": "20000x20000"}, "size"),
        ({"image": png(), "extra_body": {"strength": 2}}, "strength"),
        ({"image": png(), "extra_body": {"loras": "["}}, "loras"),
        ({"image": png(), "n": 99}, "n"),
    ],
)
def test_a_wrong_edit_is_refused(
    client: openai.OpenAI, arguments: dict[str, Any], param: str
) -> None:
    error = refused(client.images.edit, **arguments)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param


def test_a_failure_before_the_first_event_is_an_ordinary_answer(client: openai.OpenAI) -> None:
    error = refused(client.images.generate, prompt="fault:fail", stream=True)
    assert isinstance(error, openai.InternalServerError)
    assert error.code == "generation_failed"


def test_a_failure_after_the_first_event_is_the_last_event(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="fault:fail step=3", model="sd15", stream=True, partial_images=1
    )
    assert next(stream).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert caught.value.code == "generation_failed"


def test_a_form_that_is_none_is_refused(scripted: RunningServer) -> None:
    for content_type in (
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=" + "x" * 300,
        "application/json",
    ):
        answer = scripted.client.post(
            "/v1/images/edits", content=b"--x\r\nnonsense", headers={"Content-Type": content_type}
        )
        assert answer.status_code in (400, 415), content_type
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_same_key_brings_the_same_edit(scripted: RunningServer) -> None:
    def edited(prompt: str) -> Any:
        return scripted.client.post(
            "/v1/images/edits",
            data={"prompt": prompt, "model": "sd15"},
            files={"image": ("a.png", png(), "image/png")},
            headers={"Idempotency-Key": "an-edit"},
        )

    first = edited("a fox")
    assert first.status_code == 200
    assert edited("a fox").json()["data"] == first.json()["data"]
    assert edited("a hare").status_code == 400


@pytest.mark.parametrize("partial_images", [0, 1])
def test_a_caller_who_leaves_a_stream_cancels_its_job(
    scripted: RunningServer, partial_images: int
) -> None:
    """Before the first event, and after it."""
    asked = {
        "prompt": "fault:slow step_seconds=0.05", "model": "sd15", "stream": True,
        "partial_images": partial_images, "num_inference_steps": 1000,
    }  # fmt: skip
    with Connection(scripted.url) as connection:
        body = json.dumps(asked).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        connection.send(head("POST /v1/images/generations", headers) + body)
        wait_until(lambda: any(worker["running"] for worker in scripted.placement()))
        if partial_images:
            assert b"partial_image" in connection.read_until(b"partial_image")
    wait_until(lambda: not any(worker["running"] for worker in scripted.placement()), 5)
