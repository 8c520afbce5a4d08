"""Pictures in and out: decoding, encoding with texts inside, and rough previews.

Takes bytes and gives Pillow pictures, and the other way round; knows no messages.
"""

import io
import json
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from gpu_worker.failures import Refusal
from ipc.messages import OutputFormat

MULTIPLE = 8
MAX_EXIF_CHARACTERS = 15_000  # two bytes each, twice, within JPEG's 64 KiB segment
USER_COMMENT = 0x9286
IMAGE_DESCRIPTION = 0x010E
EXIF_FOLDER = 0x8769
PREVIEW_SCALE = 4
JPEG_QUALITY = 95
WEBP_QUALITY = 90

# Linear fits of decoded pictures to latents, published by keturn and Birch-san for
# SD 1.x and SDXL: rows are latent channels, columns red, green, blue.
SD_FACTORS = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)
SDXL_FACTORS = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)


def decoded(data: bytes, field: str) -> Image.Image:
    """An RGB picture whose sides are multiples of 8, made smaller where they were not.

    Raises Refusal naming `field` where the bytes are no PNG, JPEG or WebP.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        rgb = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        detail = f"cannot read {field}: it is not a whole PNG, JPEG or WebP picture"
        raise Refusal("invalid_request", detail, field) from error
    return _resized(rgb, field)


def _resized(picture: Image.Image, field: str) -> Image.Image:
    size = (picture.width - picture.width % MULTIPLE, picture.height - picture.height % MULTIPLE)
    if size == picture.size:
        return picture
    if not all(size):
        detail = f"cannot use {field}: a picture is at least {MULTIPLE} pixels wide and high"
        raise Refusal("invalid_request", detail, field)
    return picture.resize(size, Image.Resampling.LANCZOS)


def encoded(
    picture: Image.Image,
    output_format: OutputFormat,
    texts: dict[str, str] | None = None,
    quality: int | None = None,
) -> bytes:
    """The picture's file, with `texts` inside: PNG text chunks, or EXIF.

    `quality` is 0 to 100, for JPEG and WebP.

    The text called "parameters" is A1111's: it is the EXIF UserComment; the rest
    goes into ImageDescription as JSON.
    """
    file = io.BytesIO()
    texts = texts or {}
    default = {"jpeg": JPEG_QUALITY, "webp": WEBP_QUALITY}.get(output_format)
    chosen = default if quality is None else quality
    match output_format:
        case "png":
            picture.save(file, "PNG", compress_level=1, pnginfo=_png_texts(texts))
        case "jpeg":
            picture.convert("RGB").save(file, "JPEG", quality=chosen, exif=_exif(texts))
        case "webp":
            picture.save(file, "WEBP", quality=chosen, method=0, exif=_exif(texts))
    return file.getvalue()


def _png_texts(texts: dict[str, str]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)  # iTXt where Latin-1 does not suffice
    return info


def _exif(texts: dict[str, str]) -> bytes:
    if not texts:
        return b""
    exif = Image.Exif()
    others = {key: text for key, text in texts.items() if key != "parameters"}
    if others:
        exif[IMAGE_DESCRIPTION] = json.dumps(others)[: 2 * MAX_EXIF_CHARACTERS]
    if "parameters" in texts:
        comment = texts["parameters"][:MAX_EXIF_CHARACTERS].encode("utf-16-be", "replace")
        exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = b"UNICODE\0" + comment
    return exif.tobytes()


def preview(latents: torch.Tensor, factors: tuple[tuple[float, ...], ...] | None) -> Image.Image:
    """A rough picture of one picture's latents, shape (1, channels, height, width).

    Without factors, or with other channels than they are for, the first three
    channels are stretched over the range of colours.
    """
    channels = latents[0].detach().float().cpu()
    if factors is not None and len(factors) == channels.shape[0]:
        weights = torch.tensor(factors)
        colours = torch.einsum("chw,cr->hwr", channels, weights) / 2 + 0.5
    else:
        colours = _stretched(channels[:3].permute(1, 2, 0))
    pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy())
    size = (picture.width * PREVIEW_SCALE, picture.height * PREVIEW_SCALE)
    return picture.resize(size, Image.Resampling.BILINEAR)


def _stretched(channels: torch.Tensor) -> torch.Tensor:
    low, high = channels.min(), channels.max()
    return (channels[..., :1] if channels.shape[-1] < 3 else channels).sub(low) / (
        (high - low).clamp(min=1e-6)
    )


def preview_data(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return file.getvalue()


def fitting_factors(family: str, latent_channels: Any) -> tuple[tuple[float, ...], ...] | None:
    """The factors for a family's latents, or None."""
    if latent_channels != 4:
        return None
    return {"sdxl": SDXL_FACTORS, "sdxl_refiner": SDXL_FACTORS}.get(
        family, SD_FACTORS if family in ("sd15", "sd21") else None
    )
