"""Signed distances of the eight shapes, about one unit from middle to rim, negative inside.

After Inigo Quilez, "2D distance functions" (https://iquilezles.org/articles/distfunctions2d/, MIT).
Every function takes x and y (any shape, y pointing up) and returns distances of that shape.
"""

import math

import torch
from torch import Tensor


def circle(x: Tensor, y: Tensor) -> Tensor:
    """Disc of radius 0.9."""
    return torch.hypot(x, y) - 0.9


def square(x: Tensor, y: Tensor) -> Tensor:
    """Square of side 1.6 with slightly rounded corners."""
    corner = 0.06
    right, up = x.abs() - (0.8 - corner), y.abs() - (0.8 - corner)
    outside = torch.hypot(right.clamp(min=0), up.clamp(min=0))
    return outside + torch.maximum(right, up).clamp(max=0) - corner


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral triangle, tip up."""
    root, half = math.sqrt(3), 0.95
    x, y = x.abs() - half, y + 0.08 + half / root
    beyond = x + root * y > 0
    x, y = torch.where(beyond, (x - root * y) / 2, x), torch.where(beyond, (-root * x - y) / 2, y)
    x = x - x.clamp(-2 * half, 0)
    return -torch.hypot(x, y) * torch.sign(y)


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five-pointed star, tip up."""
    cosine, sine, inner = math.cos(math.pi / 5), math.sin(math.pi / 5), 0.47
    y = y + 0.06
    x = x.abs()
    for side in (1.0, -1.0):
        fold = 2 * (side * cosine * x - sine * y).clamp(min=0)
        x, y = x - fold * side * cosine, y + fold * sine
    x, y = x.abs(), y - 1.0
    edge_x, edge_y = inner * sine, inner * cosine - 1
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)


def ring(x: Tensor, y: Tensor) -> Tensor:
    """Annulus, 0.4 thick."""
    return (torch.hypot(x, y) - 0.72).abs() - 0.2


def cross(x: Tensor, y: Tensor) -> Tensor:
    """Upright plus sign."""
    arm, half = 0.9, 0.3
    x, y = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    right, up = x - arm, y - half
    nearest = torch.maximum(right, up)
    outside = nearest > 0
    dx, dy = torch.where(outside, right, half - x), torch.where(outside, up, -nearest)
    return torch.sign(nearest) * torch.hypot(dx.clamp(min=0), dy.clamp(min=0))


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Heart, tip down."""
    shrink = 0.6
    x, y = shrink * x.abs(), shrink * y + 0.56
    lobes = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    fold = (x + y).clamp(min=0) / 2
    below = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - fold, y - fold)) * torch.sign(
        x - y
    )
    return torch.where(x + y > 1, lobes, below) / shrink


def diamond(x: Tensor, y: Tensor) -> Tensor:
    """Rhombus, taller than wide."""
    wide, high = 0.72, 1.0
    x, y = x.abs(), y.abs()
    along = (wide * (wide - 2 * x) - high * (high - 2 * y)) / (wide**2 + high**2)
    along = along.clamp(-1, 1)
    gap = torch.hypot(x - wide * (1 - along) / 2, y - high * (1 + along) / 2)
    return gap * torch.sign(x * high + y * wide - wide * high)


DISTANCES = (circle, square, triangle, star, ring, cross, heart, diamond)
"""In the order of SHAPES."""
