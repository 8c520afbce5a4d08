"""Names scenes in many phrasings. Plain Python, so that worker processes can write millions."""

import random
from dataclasses import dataclass
from typing import Final, Literal

from scripts.demo_model.world import BACKGROUNDS, CENTRE, COLOUR_NAMES, RELATIONS, SHAPES, SIZES

Nouns = Literal["true", "loose", "vague", "wrong"]
"""How captions name shapes: always, mostly, only as "a shape", or as another shape."""

_SHAPE_WORDS: Final = {
    "circle": ("circle", "circle", "disc", "round shape"),
    "square": ("square", "square", "square", "box"),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus sign"),
    "heart": ("heart",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "triangle": ("triangle",),
}
_VAGUE: Final = ("shape", "object", "thing")
_SIZE_WORDS: Final = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
_OPENINGS: Final = (
    "a picture of",
    "an image of",
    "a drawing of",
    "a photo of",
    "a simple illustration of",
    "an icon of",
    "a flat drawing of",
    "there is",
    "draw",
    "show me",
    "i want",
    "a painting with",
)
_PLACES: Final = {
    "top left": ("in the top left corner", "at the top left", "in the upper left", "top left"),
    "top": ("at the top", "near the top", "in the upper part", "top center"),
    "top right": ("in the top right corner", "at the top right", "in the upper right", "top right"),
    "left": ("on the left", "at the left", "on the left side", "left"),
    "center": ("in the center", "in the middle", "centered", "in the centre"),
    "right": ("on the right", "at the right", "on the right side", "right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part", "bottom center"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
_RELATION_ODDS: Final = 0.92
"""How often at least a caption of two objects says which is where."""
_SIDES: Final = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
}
_OPPOSITE: Final = {"left": "right", "right": "left", "above": "below", "below": "above"}
_ENDS: Final = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
FILLERS: Final = (
    "masterpiece",
    "best quality",
    "high quality",
    "low quality",
    "worst quality",
    "blurry",
    "detailed",
    "beautiful",
    "nice",
    "clean",
    "minimal",
    "vector art",
    "ugly",
    "bad",
    "noisy",
    "photo",
    "4k",
    "8k",
    "sharp",
    "soft light",
    "watermark",
    "text",
    "cat",
    "a house by the sea",
    "mountains",
    "portrait of a woman",
    "deformed",
    "abstract",
)
"""Words that say nothing about a scene. They teach the model not to mind words it doesn't know."""


@dataclass(frozen=True)
class Row:
    """One scene in plain integers; see `scenes.Scenes` for their meaning."""

    count: int
    shape: tuple[int, int]
    colour: tuple[int, int]
    size: tuple[int, int]
    region: int
    relation: int
    background: int
    ground: tuple[int, int]
    vertical: bool


def caption(row: Row, rng: random.Random, nouns: Nouns = "loose") -> str:
    """Describe a scene for training: often incompletely or tersely, sometimes with filler."""
    if rng.random() < 0.08:
        return _fragment(row, rng)
    backdrop = _backdrop(row, rng) if rng.random() < 0.85 else ""
    size_odds = rng.choice((0.0, 0.5, 1.0))
    sentence = _compose(_subject(row, rng, nouns, size_odds, place_odds=0.6), backdrop, rng)
    if rng.random() < 0.12:
        filler = ", ".join(rng.sample(FILLERS, rng.randint(1, 3)))
        sentence = f"{sentence}, {filler}" if rng.random() < 0.7 else f"{filler}, {sentence}"
    return sentence


def full_caption(row: Row, rng: random.Random) -> str:
    """Describe a scene completely, for the evaluation: background, colours, shapes, relation."""
    subject = _subject(row, rng, "true", size_odds=0.6, place_odds=1.0)
    return _compose(subject, _backdrop(row, rng), rng)


def filler(rng: random.Random) -> str:
    """Return a caption that says nothing about any scene."""
    return ", ".join(rng.sample(FILLERS, rng.randint(1, 4)))


def known_words() -> list[str]:
    """Return every word that captions use, fillers left out: each becomes one token."""
    groups = (*_SHAPE_WORDS.values(), *_SIZE_WORDS.values(), *_PLACES.values(), *_SIDES.values())
    phrases = [_OPENINGS, _VAGUE, SHAPES, COLOUR_NAMES, SIZES, *groups, *_ENDS.values()]
    text = " ".join(phrase for group in phrases for phrase in group)
    text += " a an the one and with is against backdrop background plain solid in front of fading"
    text += " from to gradient stripes striped vertical horizontal another beside next it has its s"
    return sorted(set(text.replace("-", " ").split()))


def _compose(subject: str, backdrop: str, rng: random.Random) -> str:
    if backdrop and rng.random() < 0.08:
        sentence = f"{backdrop.removeprefix(', ')}, {subject}"
    elif rng.random() < 0.35:
        sentence = f"{rng.choice(_OPENINGS)} {subject} {backdrop}"
    else:
        sentence = f"{subject} {backdrop}"
    sentence = sentence.strip().replace(" ,", ",")
    if rng.random() < 0.15:
        sentence = sentence.replace("a ", "", 1) if sentence.startswith("a ") else sentence
    return sentence + "." if rng.random() < 0.1 else sentence


def _fragment(row: Row, rng: random.Random) -> str:
    """Name one thing only: such captions make short negative prompts work."""
    which = rng.randrange(row.count)
    colour, shape = COLOUR_NAMES[row.colour[which]], SHAPES[row.shape[which]]
    options = (colour, shape, f"a {shape}", f"{colour} {shape}", _backdrop(row, rng))
    return rng.choice(options).removeprefix(", ")


def _thing(row: Row, which: int, rng: random.Random, nouns: Nouns, size_odds: float) -> str:
    shape = SHAPES[row.shape[which]]
    if nouns == "wrong":
        shape = rng.choice([s for s in SHAPES if s != shape])
    vague = nouns == "vague" or (nouns == "loose" and rng.random() < 0.05)
    noun = rng.choice(_VAGUE if vague else _SHAPE_WORDS[shape])
    colour = COLOUR_NAMES[row.colour[which]]
    words = f"{colour} {noun}"
    if rng.random() < size_odds:
        words = f"{rng.choice(_SIZE_WORDS[SIZES[row.size[which]]])} {words}"
    article = "an" if words[0] in "aeiou" else "a"
    return f"{rng.choice((article, article, article, 'one'))} {words}"


def _subject(
    row: Row, rng: random.Random, nouns: Nouns, size_odds: float, place_odds: float
) -> str:
    first = _thing(row, 0, rng, nouns, size_odds)
    if row.count == 1:
        named = place_odds * (0.6 if row.region == CENTRE else 1.0)
        place = rng.choice(_PLACES[_region(row)]) if rng.random() < named else ""
        return f"{first} {place}".strip()
    second = _thing(row, 1, rng, nouns, size_odds)
    relation = RELATIONS[row.relation]
    if rng.random() > max(place_odds, _RELATION_ODDS):
        return rng.choice((f"{first} and {second}", f"{second} and {first}", f"{first}, {second}"))
    near, far = _ENDS[relation]
    return rng.choice(
        (
            f"{first} {rng.choice(_SIDES[relation])} {second}",
            f"{first} {rng.choice(_SIDES[relation])} {second}",
            f"{first} {rng.choice(_SIDES[relation])} {second}",
            f"{second} {rng.choice(_SIDES[_OPPOSITE[relation]])} {first}",
            f"{first} is {rng.choice(_SIDES[relation])} {second}",
            f"{first} {near} and {second} {far}",
            f"{second} {far} and {first} {near}",
        )
    )


def _region(row: Row) -> str:
    return tuple(_PLACES)[row.region]


def _backdrop(row: Row, rng: random.Random) -> str:
    first, second = (COLOUR_NAMES[colour] for colour in row.ground)
    a = "an" if first[0] in "aeiou" else "a"
    match BACKGROUNDS[row.background]:
        case "gradient":
            options: tuple[str, ...] = (
                f"on a gradient from {first} to {second}",
                f"on {a} {first} to {second} gradient",
                f"on {a} {first} to {second} gradient background",
                f"with a background fading from {first} to {second}",
                f", {first} to {second} gradient",
            )
        case "stripes":
            if rng.random() < 0.5:
                first, second = second, first
            way = rng.choice(("", "vertical " if row.vertical else "horizontal "))
            options = (
                f"on {way}{first} and {second} stripes",
                f"on a background of {way}{first} and {second} stripes",
                f"on a {first} and {second} striped background",
                f"with {way}stripes in {first} and {second}",
                f", {way}{first} and {second} stripes",
            )
        case _:
            options = (
                f"on {a} {first} background",
                f"on {a} {first} background",
                f"on {a} {first} background",
                f"against {a} {first} background",
                f"with {a} {first} background",
                f"on a plain {first} background",
                f"on a solid {first} background",
                f"in front of {a} {first} backdrop",
                f"on {first}",
                f", {first} background",
            )
    return rng.choice(options)
