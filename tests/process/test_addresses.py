"""Addresses in fields of a request: refused as what they are not, and nobody connects to them."""

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.tools.server import RunningServer

ADDRESSES = [
    "http://127.0.0.1:{port}/a.png",
    "http://localhost:{port}/a.png",
    "http://[::1]:{port}/a.png",
    "http://[::ffff:127.0.0.1]:{port}/a.png",
    "http://2130706433:{port}/a.png",
    "http://127.0.0.1.nip.io:{port}/a.png",
    "http://[64:ff9b::7f00:1]:{port}/a.png",
    "http://[2002:7f00:1::]:{port}/a.png",
    "http://169.254.169.254/latest/meta-data",
    "http://224.0.0.1/a.png",
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/a.png",
    "//127.0.0.1:{port}/a.png",
    "s3://bucket/a.png",
]
MODEL_FIELDS = ("checkpoint", "vae", "control_model", "refiner_model", "loras")
PROMPT = {"prompt": "a fox", "num_inference_steps": 1}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something that would notice a connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield listening
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize("form", ADDRESSES)
def test_an_address_is_no_picture_and_no_model(
    scripted: RunningServer, listener: socket.socket, form: str
) -> None:
    address = form.format(port=listener.getsockname()[1])
    for field in ("image", "mask_image", "control_image"):
        given = {"checkpoint": "sd15", "parameters": PROMPT | {field: address}}
        assert scripted.generate(given).status_code == 422
    for field in MODEL_FIELDS:
        named = [{"model": address}] if field == "loras" else address
        answer = scripted.generate({"checkpoint": "sd15", "parameters": PROMPT, field: named})
        assert answer.status_code in (404, 422), (field, answer.text)
        assert address not in answer.text


def test_a_form_of_openais_takes_no_address_for_a_file(
    scripted: RunningServer, listener: socket.socket
) -> None:
    address = ADDRESSES[0].format(port=listener.getsockname()[1])
    form = {"prompt": "a fox", "model": "sd15", "image": address}
    files = {"other": (None, "")}
    answer = scripted.client.post("/v1/images/edits", data=form, files=files)
    assert answer.status_code == 400, answer.text
