"""GET /images/{name}: stored pictures, and nothing else of the disk."""

import base64
import os
from pathlib import Path

import pytest

from tests.tools.raw_http import Connection
from tests.tools.server import SCRIPTED, RunningServer, running

BODY = {
    "checkpoint": "sd15",
    "parameters": {"prompt": "a fox", "num_inference_steps": 1},
    "store_images": True,
}


def image_dir(server: RunningServer) -> Path:
    return server.log.parent / "images"


@pytest.mark.parametrize(
    ("output_format", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")]
)
def test_a_stored_picture_is_the_one_that_was_answered(
    scripted: RunningServer, output_format: str, extension: str
) -> None:
    batch = f"stored-{output_format}"
    answer = scripted.generate(BODY | {"batch_id": batch, "output_format": output_format}).json()
    stored = scripted.client.get(f"/images/{batch}-0.{extension}")
    assert stored.status_code == 200
    assert stored.headers["content-type"] == f"image/{output_format}"
    assert stored.content == base64.b64decode(answer["images"][0])


def test_the_names_in_the_answer_are_those_to_ask_for(scripted: RunningServer) -> None:
    answer = scripted.generate(BODY | {"return_images": False}).json()
    [name] = answer["images"]
    assert scripted.client.get(f"/images/{name}").status_code == 200


def test_what_is_not_a_stored_picture_is_not_found(scripted: RunningServer) -> None:
    folder = image_dir(scripted)
    (folder / "notes.txt").write_text("secret")
    (folder / "hidden-0.png").mkdir()
    os.symlink("/etc/hostname", folder / "link-0.png")
    (folder.parent / "images-of-others").mkdir()
    (folder.parent / "images-of-others" / "a-0.png").write_bytes(b"secret")
    names = [
        "missing-0.png",
        "notes.txt",
        "hidden-0.png",
        "link-0.png",
        "../images-of-others/a-0.png",
        "..%2fimages-of-others%2fa-0.png",
        "%2e%2e/images-of-others/a-0.png",
        "..%5cimages-of-others%5ca-0.png",
        "..%252fimages-of-others%252fa-0.png",
        "%2fetc%2fhostname",
        "/etc/hostname",
        "a%00-0.png",
        "a-0.png%00.txt",
        "a-0.png%0a",
        "%ff%fe-0.png",
        "",
        ".",
        "..",
        "x" * 300 + "-0.png",
        "a-0.PNG",
    ]
    with Connection(scripted.url) as connection:
        for name in names:
            answer = connection.request(f"GET /images/{name}")
            assert answer.status == 404, name
            assert answer.headers["content-type"] == "application/problem+json", name
            assert b"secret" not in answer.body
            assert b"/images-of-others" not in answer.body or "images-of-others" in name


def test_a_part_of_a_picture_can_be_asked_for(scripted: RunningServer) -> None:
    scripted.generate(BODY | {"batch_id": "ranged", "output_format": "png"})
    part = scripted.client.get("/images/ranged-0.png", headers={"Range": "bytes=0-7"})
    assert part.status_code == 206
    assert part.content == b"\x89PNG\r\n\x1a\n"


def test_a_batch_id_that_is_taken_is_refused_and_nothing_is_overwritten(
    scripted: RunningServer,
) -> None:
    scripted.generate(BODY | {"batch_id": "taken", "output_format": "png"})
    before = (image_dir(scripted) / "taken-0.png").read_bytes()
    answer = scripted.generate(BODY | {"batch_id": "taken", "output_format": "jpeg"})
    assert (answer.status_code, answer.json()["code"]) == (409, "batch_id_exists")
    assert (image_dir(scripted) / "taken-0.png").read_bytes() == before


def test_a_picture_that_finds_no_room_is_returned_in_the_refusal(
    tmp_path: Path, scripted_model_dir: Path
) -> None:
    settings = {"MODEL_DIR": str(scripted_model_dir), "MAX_DATA_DIR_SIZE_GB": "0.00002"}
    large = BODY | {"parameters": {"prompt": "fault:slow picture_bytes=50000"}}
    with running(tmp_path, SCRIPTED, **settings) as server:
        answer = server.generate(large)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
        assert base64.b64decode(answer.json()["images"][0]).startswith(b"\xff\xd8")
        kept = server.generate(large | {"return_images": False})
        assert (kept.status_code, "images" in kept.json()) == (507, False)
        assert not list(image_dir(server).iterdir())
        assert server.generate(large | {"store_images": False}).status_code == 200


def test_the_post_strategy_needs_an_address(tmp_path: Path, scripted_model_dir: Path) -> None:
    settings = {"MODEL_DIR": str(scripted_model_dir), "IMAGE_STORAGE_STRATEGY": "HTTP-POST"}
    with running(tmp_path, SCRIPTED, **settings) as server:
        answer = server.generate(BODY)
        assert (answer.status_code, answer.json()["field"]) == (422, "store_images")
        asked = {"prompt": "a", "model": "sd15", "response_format": "url"}
        answer = server.client.post("/v1/images/generations", json=asked)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
