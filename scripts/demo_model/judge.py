"""Says whether a picture shows what was asked for, by image arithmetic alone: no network judges.

Colours are compared in Oklab (Björn Ottosson, https://bottosson.github.io/posts/oklab/), where
equal distances look about equally far; shapes by overlap with the ideal shape,
both stretched to one box.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from scripts.demo_model.captions import Row
from scripts.demo_model.shapes import DISTANCES
from scripts.demo_model.world import BACKGROUNDS, COLOUR_NAMES, COLOURS, RELATIONS

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_FRAME: Final = 5  # pixels along the border in which a background is looked for
_LEAST_AREA: Final = 0.0025  # of the picture, once a pixel is taken off all around
_RIM: Final = 8  # pixels that an outline is wide at most
_BOX: Final = 48  # pixels; the side to which shapes are stretched for comparison


@dataclass(frozen=True)
class Verdict:
    """What is right in one picture; one entry per object where there may be several."""

    background: bool
    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    relation: bool | None
    """None where there is one object."""


def judge(picture: Image.Image, row: Row) -> Verdict:
    """Compare a picture with the scene that its prompt described."""
    pixels = oklab(picture)
    nearest = _nearest(pixels, _palette())
    objects = range(row.count)
    masks = [object_mask(pixels, row, which) for which in objects]
    relation = _has_relation(masks[0], masks[1], row.relation) if row.count == 2 else None
    return Verdict(
        background=_has_background(nearest, row),
        colours=tuple(_has_colour(nearest, row.colour[which]) for which in objects),
        shapes=tuple(shape_of(mask) == row.shape[which] for which, mask in enumerate(masks)),
        relation=relation,
    )


def oklab(picture: Image.Image) -> Floats:
    """Return a picture's pixels in Oklab, [H, W, 3]."""
    return _to_oklab(np.asarray(picture.convert("RGB")) / 255)


def background_colour(picture: Image.Image) -> int:
    """Return the index of the colour that most of the picture's border has."""
    return _commonest(_frame(_nearest(oklab(picture), _palette())))


def object_colour(picture: Image.Image) -> int | None:
    """Return the index of the commonest colour but the background's; None if there is none."""
    nearest = _nearest(oklab(picture), _palette())
    ground = _commonest(_frame(nearest))
    areas = [0 if c == ground else _largest_area(nearest == c) for c in range(len(COLOURS))]
    best = int(np.argmax(areas))
    return best if areas[best] >= _LEAST_AREA * nearest.size else None


def patch(picture: Image.Image, *colours: str, among: Collection[str] = COLOUR_NAMES) -> Mask:
    """Return the largest patch, [H, W], nearer to some of the colours than to others `among`."""
    names = tuple(among)
    nearest = _nearest(oklab(picture), _of(*names))
    return _largest(np.isin(nearest, [names.index(colour) for colour in colours]))


def tint(picture: Image.Image, thing: str, ground: str) -> float:
    """Return how far the inside of an object is on the way from the ground's colour to its own.

    0 for an outline and 1 for a filled shape, as a mean over the patch that the object encloses,
    without its rim.
    """
    whole = ndimage.binary_fill_holes(patch(picture, thing, among=(thing, ground)))
    inside = oklab(picture)[ndimage.binary_erosion(whole, iterations=_RIM)]
    start, end = _of(ground, thing)
    along = (inside - start) @ (end - start) / ((end - start) @ (end - start))
    return float(along.mean()) if len(along) else 0.0


def object_mask(pixels: Floats, row: Row, which: int) -> Mask:
    """Return the largest patch, [H, W], nearer to the object's colour than to the others."""
    grounds = row.ground if BACKGROUNDS[row.background] != "plain" else row.ground[:1]
    present = (*row.colour[: row.count], *grounds)
    return _largest(_nearest(pixels, _palette()[list(present)]) == which)


def shape_of(mask: Mask) -> int | None:
    """Return the index of the shape that overlaps best with a mask; None for an empty mask."""
    if not mask.any():
        return None
    boxed = _boxed(mask)
    overlaps = [(boxed & ideal).sum() / (boxed | ideal).sum() for ideal in _ideal_shapes()]
    return int(np.argmax(overlaps))


def filled_share(mask: Mask) -> float:
    """Return how much of a mask's silhouette is filled: 1 for a disc, little for its outline."""
    whole = ndimage.binary_fill_holes(mask)
    return float(mask.sum() / whole.sum()) if mask.any() else 0.0


def _has_background(nearest: NDArray[np.int64], row: Row) -> bool:
    first, second = row.ground
    match BACKGROUNDS[row.background]:
        case "gradient":
            ends = _commonest(nearest[:_FRAME]), _commonest(nearest[-_FRAME:])
            return ends == (first, second)
        case "stripes":
            frame = _frame(nearest)
            shares = [(frame == colour).mean() for colour in (first, second)]
            return bool(min(shares) > 0.2 and sum(shares) > 0.75)
        case _:
            return _commonest(_frame(nearest)) == first


def _has_colour(nearest: NDArray[np.int64], colour: int) -> bool:
    return _largest_area(nearest == colour) >= _LEAST_AREA * nearest.size


def _has_relation(first: Mask, second: Mask, relation: int) -> bool:
    if not (first.any() and second.any()):
        return False
    down, right = np.subtract(ndimage.center_of_mass(first), ndimage.center_of_mass(second))
    across, along = {"left": (down, -right), "right": (down, right), "above": (right, -down)}.get(
        RELATIONS[relation], (right, down)
    )
    return bool(along > abs(across))


def _largest(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask)
    if not count:
        return np.zeros_like(mask)
    return np.asarray(labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1)


def _largest_area(mask: Mask) -> int:
    """Return the pixels of the largest patch, a pixel taken off all around: blurred rims vanish."""
    return int(_largest(ndimage.binary_erosion(mask, np.ones((3, 3)))).sum())


def _boxed(mask: Mask) -> Mask:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    picture = Image.fromarray(cut.astype(np.uint8) * 255)
    return np.asarray(picture.resize((_BOX, _BOX), Image.Resampling.BILINEAR)) > 127


@cache
def _ideal_shapes() -> tuple[Mask, ...]:
    steps = torch.linspace(1.2, -1.2, 8 * _BOX)
    y, x = torch.meshgrid(steps, -steps, indexing="ij")
    return tuple(_boxed((distance(x, y) < 0).numpy()) for distance in DISTANCES)


@cache
def _palette() -> Floats:
    return _to_oklab(np.array(tuple(COLOURS.values())) / 255)


def _of(*names: str) -> Floats:
    return _palette()[[COLOUR_NAMES.index(name) for name in names]]


def _nearest(pixels: Floats, colours: Floats) -> NDArray[np.int64]:
    """Return the index of the nearest of [colours, 3] for each pixel, [H, W]."""
    indices: NDArray[np.int64] = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).argmin(-1)
    return indices


def _frame(nearest: NDArray[np.int64]) -> NDArray[np.int64]:
    inside = np.zeros(nearest.shape, bool)
    inside[_FRAME:-_FRAME, _FRAME:-_FRAME] = True
    return nearest[~inside]


def _commonest(indices: NDArray[np.int64]) -> int:
    return int(np.bincount(indices.ravel()).argmax())


def _to_oklab(rgb: Floats) -> Floats:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_cones = (
        (0.4122214708, 0.5363325363, 0.0514459929),
        (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005),
    )
    to_lab = (
        (0.2104542553, 0.7936177850, -0.0040720468),
        (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660),
    )
    lab: Floats = np.cbrt(linear @ np.transpose(to_cones)) @ np.transpose(to_lab)
    return lab
