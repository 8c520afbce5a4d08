"""The world the demo checkpoint knows: its words, its colours, and what is kept for testing.

Pure constants and one rule; knows nothing of tensors, so that caption workers start fast.
"""

from typing import Any, Final

NATIVE_SIZE: Final = 128
"""Width and height of a scene, in pixels."""

SHAPES: Final = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")

COLOURS: Final = {
    "red": (222, 45, 48),
    "orange": (247, 143, 30),
    "yellow": (252, 219, 62),
    "green": (52, 160, 80),
    "blue": (42, 98, 214),
    "purple": (130, 62, 178),
    "pink": (248, 152, 190),
    "brown": (124, 78, 44),
    "black": (28, 28, 34),
    "white": (248, 248, 244),
}
"""Colour word → sRGB, 0-255. Pleasant rather than pure, and far enough apart to be told apart."""

COLOUR_NAMES: Final = tuple(COLOURS)

SIZES: Final = ("small", "medium", "large")
BACKGROUNDS: Final = ("plain", "gradient", "stripes")
RELATIONS: Final = ("left", "right", "above", "below")
"""Where the first object of two is, seen from the second."""

REGIONS: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Where a single object is: row-major over a grid of three by three."""

CENTRE: Final = REGIONS.index("center")


def is_held_out(shape: Any, colour: Any, ground: Any) -> Any:
    """Say whether a (shape, colour, background colour) triple is kept from training.

    Takes indices into SHAPES and COLOUR_NAMES, as integers or as integer tensors. For every pair of
    colours one shape of eight is held out, so training sees each word in much other company.
    """
    return (3 * shape + 5 * colour + 7 * ground) % 8 == 0
