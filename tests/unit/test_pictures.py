"""Pictures that callers send: what is taken, and what is refused before a pixel is decoded."""

import base64
import io
import struct
import time
import zlib

import pytest
from PIL import Image

from supervisor.errors import Problem
from supervisor.pictures import check, decode_all, decode_base64

MAX_PIXELS = 1_000_000


def encoded(format: str = "PNG", size: tuple[int, int] = (64, 48), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format)
    return file.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_taken_as_they_are(format: str) -> None:
    data = encoded(format)
    assert decode_all({"image": text_of(data)}, MAX_PIXELS) == {"image": [data]}
    assert check(data, "image", MAX_PIXELS) == (64, 48)


@pytest.mark.parametrize("type", ["image/png", "image/jpeg", "application/octet-stream", ""])
def test_a_data_address_is_taken_whatever_type_it_tells(type: str) -> None:
    assert decode_base64(f"data:{type};base64,{text_of(b'abc')}", "image") == b"abc"


@pytest.mark.parametrize(
    "text",
    ["abc", "a b=", "YWJj\n", "YWJj====x", "ä", "-_-_", "data:image/png,YWJj", "data:;base64,,", 7],
)
def test_what_is_not_base64_is_refused_by_its_field(text: object) -> None:
    with pytest.raises(Problem) as caught:
        decode_all({"mask_image": text}, MAX_PIXELS)
    assert caught.value.code == "invalid_request"
    assert caught.value.field == "parameters.mask_image"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "EPS", "PPM", "ICO"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(Problem, match="PNG, JPEG or WebP"):
        check(encoded(format), "image", MAX_PIXELS)


@pytest.mark.parametrize(
    "data", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS\n", b"x"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(Problem, match="cannot use image"):
        check(data, "image", MAX_PIXELS)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_short_is_refused_at_every_length(format: str) -> None:
    data = encoded(format)
    for length in range(0, len(data), 7):
        with pytest.raises(Problem, match="cannot use image"):
            check(data[:length], "image", MAX_PIXELS)


def huge_png(width: int, height: int) -> bytes:
    """A small file that announces many pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(1001, 1000), (12000, 12000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(size: tuple[int, int]) -> None:
    started = time.monotonic()
    with pytest.raises(Problem, match="pixels"):
        check(huge_png(*size), "image", MAX_PIXELS)
    assert time.monotonic() - started < 0.5


def test_the_limit_itself_is_taken() -> None:
    assert check(huge_png(1000, 1000), "image", MAX_PIXELS) == (1000, 1000)


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (100_000, 8)])
def test_a_side_out_of_range_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(Problem, match="sides"):
        check(huge_png(*size), "image", MAX_PIXELS)


def test_a_text_bomb_in_a_png_is_refused() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**22))
    data = encoded()
    with pytest.raises(Problem, match="broken"):
        check(data[:33] + bomb + data[33:], "image", MAX_PIXELS)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(Problem, match="as large as image") as caught:
        decode_all(
            {"image": text_of(encoded()), "mask_image": text_of(encoded(size=(48, 64)))}, MAX_PIXELS
        )
    assert caught.value.field == "parameters.mask_image"


def test_a_mask_of_the_same_size_and_lists_of_pictures_are_taken() -> None:
    picture, mask = encoded(), encoded(mode="L")
    given = {"image": text_of(picture), "mask_image": text_of(mask)}
    control = [text_of(encoded(size=(8, 8))), text_of(encoded("WEBP"))]
    found = decode_all({**given, "control_image": control}, MAX_PIXELS)
    assert found["mask_image"] == [mask]
    assert len(found["control_image"]) == 2
