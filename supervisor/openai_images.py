"""OpenAI's image requests as our own, and our answers in OpenAI's form. Pure.

The fields and their ranges are those of OpenAI's images API; `negative_prompt`,
`num_inference_steps`, `guidance_scale`, `seed`, `strength` (edits), `loras`, `vae` and
`scheduler` are extensions. `quality` and `user` are accepted for clients that always send
them and change nothing: the number of steps is what decides the quality here.
"""

import io
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import pybase64
from msgspec import Meta

from ipc.messages import OutputFormat
from supervisor.errors import Problem
from supervisor.requests import Body, GenerateBody, LoraChoice, Name

EventKind = Literal["image_generation", "image_edit"]
Size = tuple[int, int]
SIZE = r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$(?!\n)"


class ImagesBody(Body, frozen=True, kw_only=True):
    """What generations and edits have in common."""

    prompt: Annotated[str, Meta(min_length=1, max_length=16_384)]
    model: Name | None = None
    n: Annotated[int, Meta(ge=1, le=10)] | None = None
    size: Annotated[str, Meta(pattern=SIZE)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    user: Annotated[str, Meta(max_length=500)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    loras: Annotated[list[LoraChoice], Meta(max_length=16)] = []
    vae: Name | None = None
    scheduler: Name | None = None

    @property
    def chosen_size(self) -> Size | None:
        """Width and height; None leaves them to the model or the picture."""
        if self.size in (None, "auto"):
            return None
        width, _, height = str(self.size).partition("x")
        return int(width), int(height)

    @property
    def chosen_format(self) -> OutputFormat:
        return self.output_format or "png"

    @property
    def wants_url(self) -> bool:
        return self.response_format == "url"


class GenerationsBody(ImagesBody, frozen=True, kw_only=True):
    """The JSON body of POST /v1/images/generations."""


class EditsBody(ImagesBody, frozen=True, kw_only=True):
    """The text fields of POST /v1/images/edits."""

    strength: float | None = None


def edits_body(fields: Mapping[str, str]) -> EditsBody:
    """A form's texts as a body; `loras` is JSON. Raises Problem, msgspec.ValidationError."""
    given: dict[str, Any] = dict(fields)
    if "loras" in given:
        try:
            given["loras"] = msgspec.json.decode(given["loras"])
        except (msgspec.DecodeError, RecursionError):
            raise Problem("invalid_request", "cannot read loras: it is to be JSON, such as "
                          '[{"model": "name", "scale": 0.8}]', field="loras") from None  # fmt: skip
    return msgspec.convert(given, EditsBody, strict=False)


def generate_body(
    asked: ImagesBody, pictures: Mapping[str, Any] | None = None, size: Size | None = None
) -> GenerateBody:
    """The same request in our own terms. Raises Problem.

    `pictures` are base64 by parameter, `size` what the picture is to have.
    """
    _check(asked)
    parameters = {
        "prompt": asked.prompt,
        "num_images_per_prompt": asked.n,
        "negative_prompt": asked.negative_prompt,
        "num_inference_steps": asked.num_inference_steps,
        "guidance_scale": asked.guidance_scale,
        "seed": asked.seed,
        "strength": asked.strength if isinstance(asked, EditsBody) else None,
        "width": size[0] if size else None,
        "height": size[1] if size else None,
        **(pictures or {}),
    }
    png = asked.chosen_format == "png"
    return GenerateBody(
        checkpoint=asked.model,
        parameters={name: value for name, value in parameters.items() if value is not None},
        vae=asked.vae,
        loras=asked.loras,
        scheduler=asked.scheduler,
        return_images=not asked.wants_url,
        store_images=asked.wants_url,
        output_format=asked.chosen_format,
        # For a PNG, OpenAI takes 100 to mean what it is anyway.
        output_compression=None if png and asked.output_compression == 100
        else asked.output_compression,
        previews=asked.partial_images or 0,
    )  # fmt: skip


def _check(asked: ImagesBody) -> None:
    if asked.background == "transparent":
        raise Problem("not_supported", "cannot make a transparent background: use opaque or auto",
                      field="background")  # fmt: skip
    if asked.partial_images and not asked.stream:
        raise Problem("invalid_request", "cannot send partial_images unless stream is true",
                      field="partial_images")  # fmt: skip
    if asked.stream and asked.wants_url:
        raise Problem("invalid_request", "cannot stream with response_format url: events hold "
                      "b64_json",
                      field="response_format")  # fmt: skip


class _Generated(msgspec.Struct):
    """Our own answer, of which only the pictures or their names are needed."""

    images: list[str]


def answer(body: bytes, asked: ImagesBody, images_url: str, created: int) -> bytes:
    """Our answer's JSON as OpenAI's; `images_url` comes before stored names."""
    images = msgspec.json.decode(body, type=_Generated).images
    data = [{"url": images_url + i} if asked.wants_url else {"b64_json": i} for i in images]
    content: dict[str, Any] = {"created": created, "data": data}
    content |= {"output_format": asked.chosen_format, "background": "opaque"}
    if asked.chosen_size:
        content["size"] = asked.size
    return msgspec.json.encode(content)


def completed_events(body: bytes, asked: ImagesBody, kind: EventKind, created: int) -> list[bytes]:
    """One event for each finished picture. Opens the pictures' headers: work for a thread."""
    images = msgspec.json.decode(body, type=_Generated).images
    # Tokens are not counted; the client library's type wants the object.
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
             "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}  # fmt: skip
    return [
        _event(f"{kind}.completed", image, asked.chosen_format, created, {"usage": usage})
        for image in images
    ]


def partial_event(jpeg: bytes, index: int, kind: EventKind, created: int) -> bytes:
    """A preview, which is a small JPEG whatever the picture's own format will be."""
    image = pybase64.b64encode_as_string(jpeg)
    return _event(f"{kind}.partial_image", image, "jpeg", created, {"partial_image_index": index})


def error_event(problem_body: Mapping[str, Any]) -> bytes:
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(problem_body)


def _event(kind: str, image: str, format: str, created: int, more: Mapping[str, Any]) -> bytes:
    content = {
        "type": kind,
        "b64_json": image,
        "created_at": created,
        "output_format": format,
        "size": _size(image),
        "quality": "auto",
        "background": "opaque",
        **more,
    }
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(content))


def _size(image: str) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(pybase64.b64decode(image))) as picture:
            return f"{picture.width}x{picture.height}"
    except OSError:
        return "auto"
