"""Pictures whose headers are sound and whose insides are not: the worker finds out and lives."""

import base64
import io
import random

import httpx
import pytest

from tests.tools.compare import noise_picture
from tests.tools.server import RunningServer


def damaged(format: str, rng: random.Random) -> bytes:
    """A picture's file with some bytes changed, never those of its first hundred."""
    file = io.BytesIO()
    noise_picture(rng.randrange(100)).save(file, format)
    data = bytearray(file.getvalue())
    for _ in range(rng.randint(1, 30)):
        data[rng.randrange(100, len(data) - 12)] = rng.randrange(256)
    return bytes(data)


def asked(server: RunningServer, picture: bytes, name: str) -> httpx.Response:
    sound = io.BytesIO()
    noise_picture(1).save(sound, "PNG")
    pictures = {"image": sound.getvalue(), name: picture}
    parameters = {"prompt": "a fox", "num_inference_steps": 2, "strength": 0.9}
    encoded = {key: base64.b64encode(data).decode() for key, data in pictures.items()}
    return server.generate({"checkpoint": "sd15", "parameters": {**parameters, **encoded}})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_a_damaged_picture_is_drawn_from_or_named(
    served: RunningServer, format: str, name: str
) -> None:
    rng = random.Random(f"{format} {name}")
    before = [worker["pid"] for worker in served.placement()]
    statuses = set()
    for _ in range(12):
        answer = asked(served, damaged(format, rng), name)
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert answer.status_code == 422, answer.text
            assert answer.json()["field"] == f"parameters.{name}"
    assert 422 in statuses or format != "PNG", "lossy formats forgive much"
    assert [worker["pid"] for worker in served.placement()] == before
