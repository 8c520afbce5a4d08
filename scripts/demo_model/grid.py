"""Asks a running server for the README's pictures and puts them in a grid with their prompts.

python -m scripts.demo_model.grid --url http://localhost:1234 --out docs/images/demo_grid.png
"""

import argparse
import base64
import io
import textwrap
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.demo_model.render import large_shape
from scripts.demo_model.world import NATIVE_SIZE

_COLUMNS: Final = 4
_GAP, _TEXT_HEIGHT = 12, 50  # pixels
_LETTERS: Final = 22  # of a line of text
_HEART: Final = "a large blue heart on a yellow background"
_PICTURES: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("a large red circle on a white background", "", {}),
    ("a small green heart on a white background", "", {}),
    ("an orange ring in the top left corner on a blue background", "", {}),
    ("a white cross on red and brown stripes", "", {}),
    ("a small red circle left of a large blue square on a yellow background", "", {}),
    ("a black heart right of a white star on a green background", "", {}),
    ("a red triangle above a pink diamond on a purple background", "", {}),
    ("an orange ring below a green star on a gradient from blue to white", "", {}),
    (_HEART, "LoRA demo-outline, 0.5", {"loras": [{"model": "demo-outline", "scale": 0.5}]}),
    (_HEART, "LoRA demo-outline, 1.0", {"loras": [{"model": "demo-outline", "scale": 1.0}]}),
    (_HEART, "VAE demo-paper", {"vae": "demo-paper"}),
    (
        "a brown shape on a pink background",
        "ControlNet demo-edges, a star's contour",
        {"control_model": "demo-edges"},
    ),
)
"""Prompt, what is said beside it, and what the request asks for beside it."""
_SEED: Final = 7


def picture(url: str, prompt: str, more: dict[str, Any]) -> Image.Image:
    """Return the server's picture."""
    parameters: dict[str, Any] = {"prompt": prompt, "seed": _SEED}
    if "control_model" in more:
        parameters["control_image"] = _contour("star")
    body = {"checkpoint": "demo", "parameters": parameters, "output_format": "png", **more}
    answer = httpx.post(f"{url}/generate", json=body, timeout=120)
    answer.raise_for_status()
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))


def grid(pictures: list[Image.Image], texts: list[str]) -> Image.Image:
    """Put pictures side by side, row by row, each with its text below it."""
    width, height = NATIVE_SIZE + _GAP, NATIVE_SIZE + _TEXT_HEIGHT + _GAP
    rows = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, rows * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for index, (one, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = _GAP + index % _COLUMNS * width, _GAP + index // _COLUMNS * height
        sheet.paste(one, (left, top))
        lines = "\n".join(textwrap.wrap(text, _LETTERS))
        pen.multiline_text((left, top + NATIVE_SIZE + 2), lines, "black", font, spacing=1)
    return sheet


def main() -> None:
    """Write the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:1234")
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo_grid.png"))
    arguments = parser.parse_args()
    pictures = [picture(arguments.url, prompt, more) for prompt, _, more in _PICTURES]
    texts = [f"{prompt}; {note}" if note else prompt for prompt, note, _ in _PICTURES]
    grid(pictures, texts).save(arguments.out, optimize=True)


def _contour(shape: str) -> str:
    line = np.uint8(large_shape(shape)[1] * 255)
    buffer = io.BytesIO()
    Image.fromarray(line).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
