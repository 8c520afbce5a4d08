"""Scenes as numbers: what is where. `render.py` draws them, `captions.py` names them."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from scripts.demo_model.world import (
    BACKGROUNDS,
    CENTRE,
    COLOUR_NAMES,
    RELATIONS,
    SHAPES,
    SIZES,
    is_held_out,
)

# Radius ranges in image widths, by size. Two objects are smaller, to fit side by side.
_RADII_ALONE = ((0.11, 0.135), (0.19, 0.225), (0.29, 0.33))
_RADII_PAIRED = ((0.11, 0.125), (0.15, 0.175), (0.20, 0.225))
_MARGIN = 0.035
_PLAIN, _GRADIENT, _STRIPES = range(len(BACKGROUNDS))
_BACKGROUND_ODDS = (0.6, 0.2, 0.2)
_CENTRE_ODDS = 0.36
_PAIR_SHARE = 0.65


@dataclass(frozen=True)
class Scenes:
    """A batch of N scenes, one row each; `object` columns are meaningless where `count` is smaller.

    Indices are int64, lengths are float32 in image widths, with y pointing down.
    """

    count: Tensor
    """[N] objects, 1 or 2."""
    shape: Tensor
    """[N, 2] index into SHAPES."""
    colour: Tensor
    """[N, 2] index into COLOUR_NAMES."""
    size: Tensor
    """[N, 2] index into SIZES."""
    centre: Tensor
    """[N, 2, 2] x and y of each object."""
    radius: Tensor
    """[N, 2] half of each object's extent."""
    region: Tensor
    """[N] index into REGIONS; meant for scenes of one object."""
    relation: Tensor
    """[N] index into RELATIONS; meant for scenes of two objects."""
    background: Tensor
    """[N] index into BACKGROUNDS."""
    ground: Tensor
    """[N, 2] indices of the background's colours; a plain one uses the first."""
    stripes: Tensor
    """[N] stripes across the picture, as a float."""
    vertical: Tensor
    """[N] whether the stripes stand upright."""

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: Tensor | slice) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> "Scenes":
        """Copy every column to a device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def join(parts: list[Scenes]) -> Scenes:
    """Put batches of scenes one after the other."""
    return Scenes(
        **{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)}
    )


def sample_training_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Draw scenes for whatever learns relations: most have two objects, in random order."""
    pairs = round(_PAIR_SHARE * count)
    parts = [(count - pairs, 1), (pairs, 2)]
    scenes = join([sample_scenes(number, generator, objects=objects) for number, objects in parts])
    return scenes[torch.randperm(count, generator=generator)]


def sample_scenes(
    count: int,
    generator: torch.Generator,
    *,
    held_out: bool = False,
    objects: int | None = None,
    background: str | None = None,
) -> Scenes:
    """Draw scenes at random: those for training, or with `held_out` only those kept from it.

    `objects` (1 or 2) and `background` (a word of BACKGROUNDS) fix what is otherwise drawn.
    """
    parts: list[Scenes] = []
    found = 0
    while found < count:
        drawn = _draw(max(2 * count, 20_000 if held_out else 64), generator, objects, background)
        kept = drawn[_is_wanted(drawn, held_out)]
        parts.append(kept)
        found += len(kept)
    return join(parts)[slice(0, count)]


def _is_wanted(scenes: Scenes, held_out: bool) -> Tensor:
    present = torch.arange(2) < scenes.count[:, None]
    unseen: Tensor = is_held_out(scenes.shape, scenes.colour, scenes.ground[:, :1])
    distinct = (scenes.shape[:, 0] != scenes.shape[:, 1]) | (
        scenes.colour[:, 0] != scenes.colour[:, 1]
    )
    if held_out:  # the judge finds the objects by their colours, so these must differ
        distinct = scenes.colour[:, 0] != scenes.colour[:, 1]
    clash = (scenes.colour[:, :, None] == scenes.ground[:, None, :]).any(
        2
    )  # also with a gradient's far end
    triples = (unseen | ~present).all(1) if held_out else ~(unseen & present).any(1)
    return triples & ~(clash & present).any(1) & (distinct | (scenes.count == 1))


def _draw(
    count: int, generator: torch.Generator, objects: int | None, background: str | None
) -> Scenes:
    def pick(options: int, *shape: int) -> Tensor:
        return torch.randint(options, (count, *shape), generator=generator)

    def weighted(odds: tuple[float, ...]) -> Tensor:
        return torch.multinomial(torch.tensor(odds), count, replacement=True, generator=generator)

    number = pick(2) + 1 if objects is None else torch.full((count,), objects)
    size, relation = pick(len(SIZES), 2), pick(len(RELATIONS))
    region = weighted(
        tuple(_CENTRE_ODDS if r == CENTRE else (1 - _CENTRE_ODDS) / 8 for r in range(9))
    )
    low, high = torch.tensor((_RADII_ALONE, _RADII_PAIRED))[(number - 1)[:, None], size].unbind(-1)
    radius = low + (high - low) * torch.rand(count, 2, generator=generator)
    first = pick(len(COLOUR_NAMES))
    second = (first + 1 + pick(len(COLOUR_NAMES) - 1)) % len(COLOUR_NAMES)
    kind = weighted(_BACKGROUND_ODDS)
    if background is not None:
        kind = torch.full((count,), BACKGROUNDS.index(background))
    second = torch.where(kind == _PLAIN, first, second)
    alone = _place_alone(radius[:, 0], region, generator)
    paired = _place_pair(radius, relation, generator)
    centre = torch.where((number == 1)[:, None, None], alone[:, None, :].expand(-1, 2, -1), paired)
    return Scenes(
        count=number,
        shape=pick(len(SHAPES), 2),
        colour=pick(len(COLOUR_NAMES), 2),
        size=size,
        centre=centre,
        radius=radius,
        region=region,
        relation=relation,
        background=kind,
        ground=torch.stack((first, second), 1),
        stripes=pick(5).float() + 5,
        vertical=pick(2).bool(),
    )


def _place_alone(radius: Tensor, region: Tensor, generator: torch.Generator) -> Tensor:
    """Return [N, 2] centres: near the border or the corner that the region names."""
    jitter = torch.rand(len(radius), 2, generator=generator)
    cell = torch.stack((region % 3, region // 3), 1)
    near = radius[:, None] + _MARGIN + 0.05 * jitter
    middle = 0.46 + 0.08 * jitter
    return torch.where(cell == 0, near, torch.where(cell == 1, middle, 1 - near))


def _place_pair(radius: Tensor, relation: Tensor, generator: torch.Generator) -> Tensor:
    """Return [N, 2, 2] centres of two objects that do not touch, one beside or above the other."""
    gap_draw, start_draw, *sideways = torch.rand(4, len(radius), generator=generator)
    extent = 2 * radius.sum(1)
    gap = _MARGIN + gap_draw * (1 - 3 * _MARGIN - extent).clamp(0, 0.2)
    start = _MARGIN + start_draw * (1 - 2 * _MARGIN - extent - gap).clamp(min=0)
    leads = (relation == RELATIONS.index("left")) | (relation == RELATIONS.index("above"))
    near = torch.where(leads, radius[:, 0], radius[:, 1])
    far = torch.where(leads, radius[:, 1], radius[:, 0])
    along_near, along_far = start + near, start + 2 * near + gap + far
    along = torch.where(
        leads[:, None],
        torch.stack((along_near, along_far), 1),
        torch.stack((along_far, along_near), 1),
    )
    across = 0.43 + 0.14 * torch.stack(sideways, 1)
    upright = relation >= RELATIONS.index("above")
    return torch.where(
        upright[:, None, None], torch.stack((across, along), 2), torch.stack((along, across), 2)
    )
