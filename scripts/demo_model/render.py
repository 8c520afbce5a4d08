"""Draws scenes: signed distances turned into anti-aliased pixels, in batches, on any device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scripts.demo_model.scenes import Scenes
from scripts.demo_model.shapes import DISTANCES
from scripts.demo_model.world import BACKGROUNDS, COLOURS, NATIVE_SIZE, SHAPES

_ABSENT = 1.0  # a distance, in image widths, at which nothing is drawn
_STROKE = 0.016  # half the width of an outline, in image widths: 4 pixels in all
_EDGE = 0.008  # half the width of an edge map's line
_LARGE = 0.28  # half the extent of a large shape, in image widths
_SHADOW = (0.012, 0.02)
_CREAM = (0.96, 0.91, 0.80)
_CHUNK = 512  # scenes drawn at once
_INK = (0.27, 0.18, 0.12)
LAID_LINE_PIXELS = 8
"""Spacing of the paper's lines: one latent cell, so the decoder need not know where it is."""


def render(scenes: Scenes, size: int = NATIVE_SIZE, fill: Tensor | float = 1.0) -> Tensor:
    """Draw scenes as [N, 3, size, size] float32 in 0..1.

    `fill` (a number or [N]) goes from 1, filled shapes, through tinted ones to 0, outlines only.
    """
    filled = torch.as_tensor(fill, dtype=torch.float32, device=scenes.count.device).reshape(
        -1, 1, 1, 1
    )
    canvas = _ground(scenes, size)
    distances = object_distances(scenes, size)
    shadows = object_distances(scenes, size, _SHADOW)
    for which in (0, 1):
        distance, shadow = distances[:, which, None], shadows[:, which, None]
        shade = (0.5 - shadow / 0.03).clamp(0, 1)
        canvas = canvas * (1 - 0.15 * filled * shade)
        body = _cover(distance, size) * filled
        stroke = _cover((distance + _STROKE).abs() - _STROKE, size)
        canvas = torch.lerp(canvas, _lit(scenes, which, size), torch.maximum(body, stroke))
    return canvas.clamp(0, 1)


def render_edges(scenes: Scenes, size: int = NATIVE_SIZE) -> Tensor:
    """Draw the objects' contours, white on black, as [N, 3, size, size] float32 in 0..1."""
    lines = _cover(object_distances(scenes, size).abs() - _EDGE, size).amax(1, keepdim=True)
    return lines.expand(-1, 3, -1, -1)


def large_shape(shape: str, size: int = NATIVE_SIZE) -> tuple[Tensor, Tensor]:
    """Draw one shape in the middle: where it is, [size, size] bool, and its contour in 0..1.

    The contour is a ControlNet's hint, as `render_edges` draws them for training.
    """
    x, y = _grid(size, torch.device("cpu"))
    distance = DISTANCES[SHAPES.index(shape)]
    away = distance((x - 0.5) / _LARGE, (0.5 - y) / _LARGE) * _LARGE
    return away < 0, _cover(away.abs() - _EDGE, size)


def render_paper(scenes: Scenes, size: int = NATIVE_SIZE, fill: Tensor | float = 1.0) -> Tensor:
    """Draw scenes as if on warm laid paper with ink contours: [N, 3, size, size] in 0..1."""
    device = scenes.count.device
    cream = torch.tensor(_CREAM, device=device).reshape(1, 3, 1, 1)
    ink = torch.tensor(_INK, device=device).reshape(1, 3, 1, 1)
    washed = torch.lerp(render(scenes, size, fill), cream, 0.28) * (0.35 + 0.65 * cream)
    rows = torch.arange(size, device=device).reshape(1, 1, -1, 1)
    laid = 1 - 0.05 * (0.5 + 0.5 * torch.cos(2 * math.pi * (rows + 0.5) / LAID_LINE_PIXELS))
    contour = _cover(object_distances(scenes, size).abs() - 0.01, size).amax(1, keepdim=True)
    return torch.lerp(washed * laid, ink, 0.8 * contour).clamp(0, 1)


def draw(renderer: Callable[..., Tensor], scenes: Scenes, fill: Tensor | None = None) -> Tensor:
    """Draw any number of scenes, some at a time: [N, 3, NATIVE_SIZE, NATIVE_SIZE] uint8."""
    parts = []
    for start in range(0, len(scenes), _CHUNK):
        rows = slice(start, start + _CHUNK)
        pixels = renderer(scenes[rows]) if fill is None else renderer(scenes[rows], fill=fill[rows])
        parts.append((pixels * 255).round().byte())
    return torch.cat(parts)


def palette(device: torch.device | str = "cpu") -> Tensor:
    """Return the colours in the order of COLOUR_NAMES as [colours, 3] float32 in 0..1."""
    return torch.tensor(tuple(COLOURS.values()), device=device).float() / 255


def _cover(distance: Tensor, size: int) -> Tensor:
    """Turn distances into the share of each pixel that is covered: a one-pixel ramp."""
    return (0.5 - distance * size).clamp(0, 1)


def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    steps = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return x, y


def object_distances(scenes: Scenes, size: int, offset: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Return [N, 2, size, size] distances to the objects moved by `offset`, in image widths."""
    x, y = _grid(size, scenes.count.device)
    distances = torch.full((len(scenes), 2, size, size), _ABSENT, device=scenes.count.device)
    present = torch.arange(2, device=scenes.count.device) < scenes.count[:, None]
    for index, distance in enumerate(
        DISTANCES
    ):  # one shape at a time: each pixel is worked out once
        rows, which = torch.nonzero(present & (scenes.shape == index), as_tuple=True)
        radius = scenes.radius[rows, which, None, None]
        centre = scenes.centre[rows, which]
        right = (x - offset[0] - centre[:, 0, None, None]) / radius
        up = (centre[:, 1, None, None] + offset[1] - y) / radius
        distances[rows, which] = distance(right, up) * radius
    return distances


def _lit(scenes: Scenes, which: int, size: int) -> Tensor:
    """Return an object's colour, [N, 3, size, 1]: a little lighter at the top."""
    rows = (torch.arange(size, device=scenes.count.device) + 0.5) / size
    down = (rows - scenes.centre[:, which, 1, None]) / scenes.radius[:, which, None]
    light = (1 - 0.05 * down.clamp(-1, 1))[:, None, :, None]
    return palette(scenes.count.device)[scenes.colour[:, which]][:, :, None, None] * light


def _ground(scenes: Scenes, size: int) -> Tensor:
    """Return the backgrounds, [N, 3, size, size]."""
    x, y = _grid(size, scenes.count.device)
    first, second = palette(scenes.count.device)[scenes.ground].unbind(1)
    across = torch.where(scenes.vertical[:, None, None], x, y)
    stripes = scenes.stripes[:, None, None]
    # A triangle wave that crosses zero at each stripe's border, in units of image widths.
    wave = ((across * stripes / 2) % 1 - 0.5).abs() - 0.25
    striped = (0.5 + wave * (2 / stripes) * size).clamp(0, 1)
    kind = scenes.background[:, None, None]
    blend = torch.where(kind == BACKGROUNDS.index("stripes"), striped, y.expand_as(striped))
    blend = torch.where(kind == BACKGROUNDS.index("plain"), torch.zeros_like(blend), blend)
    return torch.lerp(first[:, :, None, None], second[:, :, None, None], blend[:, None])
