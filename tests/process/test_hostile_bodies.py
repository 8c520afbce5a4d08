"""Bodies made to hurt: JSON that explodes, pictures that explode, and plain nonsense."""

import base64
import io
import json
import random
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.tools.process_memory import resident_bytes
from tests.tools.scripted_worker import solid_png
from tests.tools.server import RunningServer

MB = 2**20
DEEP = 100_000
PROMPT = {"prompt": "a fox", "num_inference_steps": 2}
ROUTES = ["/generate", "/generate/StableDiffusionPipeline", "/load/checkpoint",
          "/unload/checkpoint", "/v1/images/generations"]  # fmt: skip


def posted(server: RunningServer, route: str, body: bytes | str) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return server.client.post(route, content=body, headers=headers)


def generated(server: RunningServer, **parameters: Any) -> httpx.Response:
    return server.generate({"checkpoint": "sd15", "parameters": PROMPT | parameters})


def refused(answer: httpx.Response, field: str | None = None) -> dict[str, Any]:
    """The problem, which is the caller's fault and names the field."""
    assert 400 <= answer.status_code < 500, answer.text
    body: dict[str, Any] = answer.json()
    problem = body.get("error", body)
    named = problem.get("field", problem.get("param"))
    if field is not None:
        assert named == field, problem
    return problem


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        "[" * DEEP,
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP,
        '{"parameters":' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
        '{"parameters":{"prompt":' + "[" * DEEP + "]" * DEEP + "}}",
        b"\xff\xfe\xfd",
        b'{"checkpoint": "\xff\xff"}',
        b'{"checkpoint": "\xed\xa0\x80"}',
        b'{"checkpoint": "\\ud800"}',
        "",
        " ",
        "null",
        "[]",
        '"text"',
        "17",
        "NaN",
        "{",
        '{"checkpoint": }',
        "{} {}",
        "\ufeff{}",
        b"\0" * 1000,
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    scripted: RunningServer, route: str, body: bytes | str
) -> None:
    refused(posted(scripted, route, body))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('"seed": ' + "9" * 400, "parameters.seed"),
        ('"seed": -' + "9" * 400, "parameters.seed"),
        ('"seed": 1e400', "parameters"),
        ('"seed": 1.5', "parameters.seed"),
        ('"seed": "7"', "parameters.seed"),
        ('"seed": true', "parameters.seed"),
        ('"seed": [1, 2]', "parameters.seed"),
        ('"seed": 9223372036854775808', "parameters.seed"),
        ('"guidance_scale": 1e308', "parameters.guidance_scale"),
        ('"guidance_scale": ' + "9" * 400, "parameters.guidance_scale"),
        ('"num_inference_steps": 0', "parameters.num_inference_steps"),
        ('"num_inference_steps": 1001', "parameters.num_inference_steps"),
        ('"num_images_per_prompt": 17', "parameters.num_images_per_prompt"),
        ('"width": 65', "parameters.width"),
        ('"width": 0', "parameters.width"),
        ('"width": 16384, "height": 16384', "parameters.width"),
        ('"prompt": 7', "parameters.prompt"),
        ('"prompt": []', "parameters.prompt"),
        ('"prompt": {"a": 1}', "parameters.prompt"),
        ('"unheard_of": 1', "parameters.unheard_of"),
        ('"latents": [[1]]', "parameters.latents"),
        ('"generator": 1', "parameters.generator"),
        ('"callback_on_step_end": "os.system"', "parameters.callback_on_step_end"),
        ('"output_type": "latent"', "parameters.output_type"),
        ('"timesteps": [5, 1001]', "parameters.timesteps[1]"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(
    scripted: RunningServer, text: str, field: str
) -> None:
    body = '{"checkpoint": "sd15", "parameters": {"prompt": "a fox", ' + text + "}}"
    refused(posted(scripted, "/generate", body), field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_refused(scripted: RunningServer, number: str) -> None:
    body = '{"checkpoint": "sd15", "parameters": {"prompt": "a", "guidance_scale": ' + number + "}}"
    refused(posted(scripted, "/generate", body))


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"custom_pipeline": "evil"}, "custom_pipeline"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"pipeline": "NoPipeline"}, "pipeline"),
        ({"pipeline": "StableDiffusionXLPipeline"}, "pipeline"),
        ({"pipeline": "__import__"}, "pipeline"),
        ({"scheduler": "NoScheduler"}, "scheduler"),
        ({"a1111_scheduler": "NoSampler"}, "a1111_scheduler"),
        ({"scheduler": "DDIMScheduler", "a1111_scheduler": "DDIM"}, "a1111_scheduler"),
        ({"batch_id": "../x"}, "batch_id"),
        ({"batch_id": "x" * 101}, "batch_id"),
        ({"batch_id": "x\n"}, "batch_id"),
        ({"batch_id": "a\0b"}, "batch_id"),
        ({"output_format": "tiff"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"priority": 101}, "priority"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": -1}, "timeout_seconds"),
        ({"return_images": False}, "return_images"),
        ({"refiner_parameters": {"strength": 0.5}}, "refiner_parameters"),
        ({"control_model": []}, "control_model"),
        ({"loras": [{"model": "a", "scale": 1e9}]}, "loras[0].scale"),
        ({"loras": [{"model": "a", "weight": 1}]}, "loras[0].weight"),
        ({"loras": [{}]}, "loras[0]"),
        ({"previews": 10**6}, "previews"),
        ({"metadata": "yes"}, "metadata"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(
    scripted: RunningServer, more: dict[str, Any], field: str
) -> None:
    refused(scripted.generate({"checkpoint": "sd15", "parameters": PROMPT, **more}), field)


@pytest.mark.parametrize("worker", [7, -1, "0", "none", 10**30, None, [], {}])
@pytest.mark.parametrize("route", ["/load/checkpoint", "/unload/checkpoint"])
def test_a_worker_that_is_not_there_is_named(
    scripted: RunningServer, route: str, worker: Any
) -> None:
    answer = scripted.client.post(route, json={"checkpoint": "sd15", "worker": worker})
    if worker is None:
        assert answer.status_code == 200
    else:
        refused(answer, "worker")


# Pictures


def png(width: int = 64, height: int = 64) -> bytes:
    return solid_png(width, height, b"\1\2\3")


def huge_png(side: int) -> bytes:
    """A small file whose pixels would fill gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def drawn(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, format)
    return file.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "12000 squared": lambda: huge_png(12_000),
    "half a gigapixel": lambda: huge_png(22_000),
    "sides that overflow": lambda: huge_png(2**31 - 1),
    "no sides": lambda: huge_png(0),
    "truncated": lambda: png()[:-20],
    "truncated JPEG": lambda: drawn("JPEG")[:-60],
    "truncated WebP": lambda: drawn("WEBP")[:-10],
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n",
    "GIF": lambda: drawn("GIF"),
    "TIFF": lambda: drawn("TIFF"),
    "BMP": lambda: drawn("BMP"),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "text": lambda: b"not a picture",
    "nothing": lambda: b"",
    "a signature alone": lambda: b"\x89PNG\r\n\x1a\n",
    "one pixel": lambda: png(1, 1),
    "a pickle": lambda: b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
}  # fmt: skip


@pytest.mark.parametrize("name", list(PICTURES))
def test_a_picture_that_cannot_be_used_is_named_at_once(scripted: RunningServer, name: str) -> None:
    picture = base64.b64encode(PICTURES[name]()).decode()
    memory = resident_bytes(scripted.process.pid)
    began = time.monotonic()
    refused(generated(scripted, image=picture), "parameters.image")
    mask = {"image": base64.b64encode(png()).decode(), "mask_image": picture}
    refused(generated(scripted, **mask), "parameters.mask_image")
    files = {"image": ("a.png", PICTURES[name](), "image/png")}
    form = {"prompt": "a", "model": "sd15"}
    refused(scripted.client.post("/v1/images/edits", data=form, files=files), "image")
    assert time.monotonic() - began < 2
    assert resident_bytes(scripted.process.pid) - memory < 30 * MB


@pytest.mark.parametrize("text", ["not base64!", "====", "data:image/png;base64,@", "A", 7, [], {}])
def test_what_is_not_base64_is_named(scripted: RunningServer, text: Any) -> None:
    refused(generated(scripted, image=text), "parameters.image")


def test_a_mask_of_another_size_is_named(scripted: RunningServer) -> None:
    image, mask = (base64.b64encode(png(w, 64)).decode() for w in (64, 128))
    refused(generated(scripted, image=image, mask_image=mask), "parameters.mask_image")


# A thousand bodies


def malformed(kind: int, rng: random.Random) -> bytes:
    """One of twenty kinds of nonsense, some of it large."""
    good = {"checkpoint": "sd15", "parameters": {"prompt": "a", "num_inference_steps": 1}}
    text = json.dumps(good).encode()
    huge = "9" * rng.randint(400, 20_000)
    deep = rng.randint(1, 100_000)
    kinds: list[Callable[[], Any]] = [
        lambda: text[: rng.randint(0, len(text) - 1)],
        lambda: rng.randbytes(rng.randint(1, 100_000)),
        lambda: text.replace(b'"a"', b'"\xff\xfe"'),
        lambda: b"[" * deep,
        lambda: b'{"parameters":' * deep + b"}" * deep,
        lambda: text.replace(b"1}", huge.encode() + b"}"),
        lambda: text.replace(b"1}", b"NaN}"),
        lambda: {**good, rng.randbytes(8).hex(): rng.random()},
        lambda: {**good, "parameters": {"prompt": "a", rng.randbytes(4).hex(): 1}},
        lambda: {**good, "checkpoint": "../" * rng.randint(1, 100) + "etc/passwd"},
        lambda: {**good, "checkpoint": "x" * rng.randint(501, 100_000)},
        lambda: {**good, "parameters": {"prompt": "x" * 100_000}},
        lambda: {**good, "parameters": {"prompt": ["a"] * rng.randint(17, 10_000)}},
        lambda: {**good, "loras": [{"model": "a"}] * rng.randint(17, 5000)},
        lambda: {**good, "parameters": {"prompt": "a", "image": rng.randbytes(50_000).hex()}},
        lambda: {**good, "parameters": {"prompt": "a", "width": rng.randint(1, 10**9) * 2 + 1}},
        lambda: {**good, "parameters": [1] * 10_000},
        lambda: {**good, "batch_id": "a" * rng.randint(101, 10_000)},
        lambda: {**good, "refiner_parameters": {"a": [0] * 10_000}},
        lambda: {key + "\0": value for key, value in good.items()},
    ]
    made = kinds[kind]()
    return made if isinstance(made, bytes) else json.dumps(made).encode()


def test_a_thousand_malformed_bodies_leave_no_trace(scripted: RunningServer) -> None:
    rng = random.Random(6)
    pid = scripted.process.pid
    for kind in range(20):
        refused(posted(scripted, "/generate", malformed(kind, rng)))
    before = resident_bytes(pid)
    for number in range(1000):
        answer = posted(scripted, "/generate", malformed(number % 20, rng))
        assert 400 <= answer.status_code < 500, (number % 20, answer.text)
    assert resident_bytes(pid) - before <= 20 * MB
    assert generated(scripted).status_code == 200
