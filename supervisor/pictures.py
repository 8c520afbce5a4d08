"""Input pictures: base64 to bytes, and what can be known without decoding a pixel.

Format and size are read from the file's first bytes; the pixels themselves are decoded
in the worker, which finds what is broken deeper inside. This is work for a thread.
"""

import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

import pybase64

from supervisor.errors import Problem

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8
MAX_SIDE = 2**16
DATA_URL = re.compile(r"data:[\w/.+-]{0,60};base64,", re.ASCII)
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
"""What a whole file holds last; Pillow itself refuses a WebP that is cut."""

Size = tuple[int, int]


def decode_all(given: Mapping[str, Any], max_pixels: int) -> dict[str, list[bytes]]:
    """Base64 pictures by parameter, one or a list each, as their encoded bytes.

    Raises Problem naming the parameter. A mask must be as large as its picture.
    """
    found: dict[str, list[bytes]] = {}
    sizes: dict[str, list[Size]] = {}
    for name, value in given.items():
        found[name], sizes[name] = [], []
        for text in value if isinstance(value, list) else [value]:
            data = decode_base64(text, f"parameters.{name}")
            sizes[name].append(check(data, f"parameters.{name}", max_pixels))
            found[name].append(data)
    _check_masks(sizes)
    return found


def decode_base64(text: object, field: str) -> bytes:
    """Standard base64 with padding, a `data:` address before it or not. Raises Problem."""
    if not isinstance(text, str):
        raise _refused(field, "it is not a base64 text")
    prefix = DATA_URL.match(text)
    try:
        return pybase64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except (binascii.Error, ValueError):
        raise _refused(field, "it is not valid base64") from None


def check(data: bytes, field: str, max_pixels: int) -> Size:
    """Width and height of a PNG, JPEG or WebP, told by its content. Raises Problem."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = max_pixels  # it refuses twice as many before it makes a decoder
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            size, format = picture.size, picture.format or ""
    except UnidentifiedImageError:
        raise _refused(field, "it is not a PNG, JPEG or WebP picture") from None
    except Image.DecompressionBombError:
        raise _refused(field, f"it has more than {max_pixels} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError):
        raise _refused(field, "it is a broken picture") from None
    _check_size(size, field, max_pixels)
    if ENDS.get(format, b"") not in data:
        raise _refused(field, "it is a picture cut short")
    return size


def _check_size(size: Size, field: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        reason = f"it has {width} x {height} pixels, more than {max_pixels} in all"
        raise _refused(field, reason)
    if min(size) < MIN_SIDE or max(size) > MAX_SIDE:
        raise _refused(field, f"its sides must have {MIN_SIDE} to {MAX_SIDE} pixels")


def _check_masks(sizes: Mapping[str, list[Size]]) -> None:
    """One mask may serve several pictures, and several masks one picture."""
    for mask in set(sizes.get("mask_image", [])):
        for picture in set(sizes.get("image", [])):
            if mask != picture:
                shown = f"{mask[0]} x {mask[1]} pixels, image {picture[0]} x {picture[1]}"
                raise _refused(
                    "parameters.mask_image", f"it must be as large as image: it has {shown}"
                )


def _refused(field: str, reason: str) -> Problem:
    return Problem("invalid_request", f"cannot use {field}: {reason}", field=field)
