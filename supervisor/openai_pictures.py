"""Pictures of OpenAI's edits, made into what our own requests take. Work for a thread.

The one place of the supervisor where a caller's pixels are decoded: OpenAI's mask is the
transparent part of a picture, ours is white on black, and a size that was asked for is the
picture's own. Format, sides and pixels have passed pictures.check before.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pybase64

from supervisor import pictures
from supervisor.errors import Problem
from supervisor.openai_images import Size

if TYPE_CHECKING:
    from PIL import Image

MULTIPLE = 8


def prepared(
    images: Sequence[bytes], mask: bytes | None, size: Size | None, max_pixels: int
) -> tuple[dict[str, Any], Size | None]:
    """Base64 pictures by parameter, and the size to draw at where there is a mask.

    Without a mask the picture's own size is what is drawn, so it is brought to `size`.
    Raises Problem.
    """
    if size and size[0] * size[1] > max_pixels:
        detail = f"cannot use size: {size[0]}x{size[1]} is more than {max_pixels} pixels"
        raise Problem("invalid_request", detail, field="size")
    own = [pictures.check(data, "image", max_pixels) for data in images]
    if mask is None:
        sized = [_resized(data, was, size) for data, was in zip(images, own, strict=True)]
        return {"image": _one_or_all(sized)}, None
    mask_size = pictures.check(mask, "mask", max_pixels)
    if mask_size != own[0]:
        detail = (f"cannot use mask: it must be as large as image: it has {mask_size[0]} x "
                  f"{mask_size[1]} pixels, image {own[0][0]} x {own[0][1]}")  # fmt: skip
        raise Problem("invalid_request", detail, field="mask")
    found = {"image": _one_or_all(list(images)), "mask_image": _text(_white_where_clear(mask))}
    return found, size or (_rounded(own[0][0]), _rounded(own[0][1]))


def _white_where_clear(mask: bytes) -> bytes:
    """White where the mask is transparent; a mask without transparency stays as it is."""
    picture = _opened(mask, "mask")
    if not picture.has_transparency_data:
        return mask
    return _png(picture.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha))


def _resized(data: bytes, was: Size, size: Size | None) -> bytes:
    if size is None or size == was:
        return data
    return _png(_opened(data, "image").convert("RGB").resize(size))


def _opened(data: bytes, field: str) -> "Image.Image":
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=pictures.FORMATS)
        picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error):
        raise Problem("invalid_request", f"cannot use {field}: it is a broken picture",
                      field=field) from None  # fmt: skip
    return picture


def _png(picture: "Image.Image") -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _rounded(side: int) -> int:
    return max(side - side % MULTIPLE, MULTIPLE)


def _one_or_all(images: list[bytes]) -> Any:
    texts = [_text(image) for image in images]
    return texts[0] if len(texts) == 1 else texts


def _text(data: bytes) -> str:
    return pybase64.b64encode_as_string(data)
