"""OpenAI's client and our own requests get the same pictures from a real worker."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.tools.compare import half_mask, noise_picture, over_http, pixels
from tests.tools.server import RunningServer

EXTRA = {"num_inference_steps": 3, "guidance_scale": 5.0, "seed": 11, "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def ours(served: RunningServer, pipeline: str, **more: Any) -> list[Image.Image]:
    return over_http(served, "sd15", pipeline, {"prompt": "a fox", **EXTRA, **more})


def test_generations_are_our_own_pictures(client: openai.OpenAI, served: RunningServer) -> None:
    with client.images.generate(
        prompt="a fox", model="sd15", size="64x64", n=2, stream=True, partial_images=1,
        extra_body=EXTRA,
    ) as stream:  # fmt: skip
        events = list(stream)
    done = [event for event in events if event.type == "image_generation.completed"]
    assert len(events) == 4
    expected = ours(served, "StableDiffusionPipeline", width=64, height=64, num_images_per_prompt=2)
    # Two pictures of one request share steps, and may round otherwise than each by itself.
    for event, picture in zip(done, expected, strict=True):
        difference = pixels(opened(event.b64_json)).astype(int) - pixels(picture)
        assert abs(difference).max() <= 1


def test_a_clear_part_of_a_mask_is_our_white_part(
    client: openai.OpenAI, served: RunningServer
) -> None:
    picture, white = noise_picture(1), half_mask()
    mask = Image.new("RGBA", picture.size)
    mask.putalpha(white.point(lambda value: 255 - value))
    answer = client.images.edit(
        image=png(picture), mask=png(mask), prompt="a fox", model="sd15", extra_body=EXTRA
    )
    [expected] = ours(
        served, "StableDiffusionInpaintPipeline", image=picture, mask_image=white,
        width=64, height=64,
    )  # fmt: skip
    assert np.array_equal(pixels(opened((answer.data or [])[0].b64_json)), pixels(expected))


def test_an_edit_of_another_size_starts_from_the_picture_in_that_size(
    client: openai.OpenAI, served: RunningServer
) -> None:
    answer = client.images.edit(
        image=png(noise_picture(1)), prompt="a fox", model="sd15", size="128x64",  # type: ignore[call-overload]
        extra_body=EXTRA,
    )  # fmt: skip
    [expected] = ours(
        served, "StableDiffusionImg2ImgPipeline", image=noise_picture(1).resize((128, 64))
    )
    assert np.array_equal(pixels(opened(answer.data[0].b64_json)), pixels(expected))


def test_the_files_quality_is_the_one_asked_for(client: openai.OpenAI) -> None:
    def size(output_compression: int) -> int:
        answer = client.images.generate(
            prompt="a fox", model="sd15", size="128x128", output_format="jpeg",  # type: ignore[call-overload]
            output_compression=output_compression, extra_body=EXTRA,
        )  # fmt: skip
        return len(answer.data[0].b64_json)

    assert size(10) < size(95) < size(100)
