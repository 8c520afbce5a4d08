"""The texts inside pictures, read back from what HTTP returns."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from tests.tools.server import RunningServer

USER_COMMENT = 0x9286
IMAGE_DESCRIPTION = 0x010E
EXIF_FOLDER = 0x8769

BODY: dict[str, Any] = {
    "checkpoint": "sd15",
    "parameters": {
        "prompt": "ein Füchslein, 狐",
        "negative_prompt": "blurry",
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "width": 64,
        "height": 64,
        "seed": 41,
        "num_images_per_prompt": 2,
    },
}


def pictures(server: RunningServer, **more: Any) -> list[Image.Image]:
    answer = server.generate(BODY | more)
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer.json()["images"]]


def texts(picture: Image.Image) -> tuple[str, dict[str, Any]]:
    """A1111's text and our request, from PNG text chunks or from EXIF."""
    if picture.format == "PNG":
        return picture.info["parameters"], json.loads(picture.info["igi"])
    exif = picture.getexif()
    comment = exif.get_ifd(EXIF_FOLDER)[USER_COMMENT]
    assert comment.startswith(b"UNICODE\0")
    described = json.loads(exif[IMAGE_DESCRIPTION])
    return comment[8:].decode("utf-16-be"), json.loads(described["igi"])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_each_picture_tells_how_it_was_made(served: RunningServer, output_format: str) -> None:
    for index, picture in enumerate(pictures(served, output_format=output_format)):
        text, request = texts(picture)
        assert text.startswith("ein Füchslein, 狐\nNegative prompt: blurry\nSteps: 2, Sampler: ")
        assert f"CFG scale: 5.0, Seed: {41 + index}, Size: 64x64, Model: sd15" in text
        assert request["parameters"]["seed"] == 41 + index


def test_what_a_picture_tells_makes_it_again(served: RunningServer) -> None:
    second = pictures(served, output_format="png", deterministic=True)[1]
    request = texts(second)[1]
    again = served.generate(request)
    assert again.status_code == 200, again.text
    data = base64.b64decode(again.json()["images"][0])
    assert Image.open(io.BytesIO(data)).tobytes() == second.tobytes()


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_picture_says_nothing_when_asked_not_to(
    served: RunningServer, output_format: str
) -> None:
    for picture in pictures(served, output_format=output_format, metadata=False):
        assert "parameters" not in picture.info
        assert "igi" not in picture.info
        assert not dict(picture.getexif())
