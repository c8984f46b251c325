"""The world in pictures: 96x96 palette PNGs of a few shapes on speckled ground, about a kilobyte each.

A picture depends on its scene and seed only.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from io import BytesIO
from random import Random

from PIL import Image, ImageDraw

from tools.demo_models.world import Scene

SIDE = 96
RADII = {"small": 6, "large": 11}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 230, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
# The box (left, top, right, bottom) in which the cells of a position lie, and its columns of cells.
BOXES = {
    "top": ((0, 0, 96, 40), 4),
    "bottom": ((0, 56, 96, 96), 4),
    "left": ((0, 0, 40, 96), 1),
    "right": ((56, 0, 96, 96), 1),
    "middle": ((22, 22, 74, 74), 2),
}
SPECKLES = 30

Point = tuple[float, float]


def render(random: Random, scene: Scene) -> Image.Image:
    """A scene as a palette image whose ground, places, sizes and hues vary a little."""
    ground = random.randint(110, 160)
    image = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    draw = ImageDraw.Draw(image)
    for _ in range(SPECKLES):
        shade = ground + random.choice((-25, 25))
        draw.point((random.randrange(SIDE), random.randrange(SIDE)), fill=(shade, shade, shade))
    colour = _jittered(random, COLOURS[scene.colour])
    for centre in _centres(random, scene):
        _DRAW[scene.shape](draw, centre, RADII[scene.size] + random.choice((-1, 0, 0, 1)), colour)
    return image.quantize(16, dither=Image.Dither.NONE)


def data_url(image: Image.Image) -> str:
    """The picture as a base64 PNG `data:` URL."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _jittered(random: Random, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + random.randint(-10, 10))) for value in colour)
    return red, green, blue


def _centres(random: Random, scene: Scene) -> list[Point]:
    """Places for the shapes: neighbouring cells around the middle of the position's box, jittered."""
    (left, top, right, bottom), columns = BOXES[scene.position]
    rows = 4 // columns
    width, height = (right - left) / columns, (bottom - top) / rows
    slack_x, slack_y = (max(0.0, min(extent / 2 - RADII[scene.size] - 1, 6)) for extent in (width, height))
    return [
        (
            left + (x + 0.5) * width + random.uniform(-slack_x, slack_x),
            top + (y + 0.5) * height + random.uniform(-slack_y, slack_y),
        )
        for x, y in _cells(random, COUNTS[scene.count], columns, rows)
    ]


def _cells(random: Random, count: int, columns: int, rows: int) -> list[Point]:
    """Cell indices: any of the square's four, or a centred run of a row or column.

    Centred, so that a lone shape at the top is never also at the right.
    """
    if columns == rows:
        return list(random.sample([(x, y) for x in range(columns) for y in range(rows)], count))
    run = [(4 - count) / 2 + step for step in range(count)]
    return [(place, 0.0) if rows == 1 else (0.0, place) for place in run]


Draw = Callable[[ImageDraw.ImageDraw, Point, int, tuple[int, int, int]], None]


def _box(centre: Point, radius: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def _circle(draw: ImageDraw.ImageDraw, centre: Point, radius: int, colour: tuple[int, int, int]) -> None:
    draw.ellipse(_box(centre, radius), fill=colour)


def _square(draw: ImageDraw.ImageDraw, centre: Point, radius: int, colour: tuple[int, int, int]) -> None:
    draw.rectangle(_box(centre, radius * 0.9), fill=colour)


def _ring(draw: ImageDraw.ImageDraw, centre: Point, radius: int, colour: tuple[int, int, int]) -> None:
    draw.ellipse(_box(centre, radius), outline=colour, width=max(2, round(radius * 0.35)))


def _cross(draw: ImageDraw.ImageDraw, centre: Point, radius: int, colour: tuple[int, int, int]) -> None:
    (x, y), arm = centre, radius * 0.33
    draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def _polygon(corners: int, inner: float) -> Draw:
    """A regular polygon, or a star when `inner` (its inner radius as a share) is not zero."""

    def drawn(draw: ImageDraw.ImageDraw, centre: Point, radius: int, colour: tuple[int, int, int]) -> None:
        steps = corners * 2 if inner else corners
        points = []
        for step in range(steps):
            reach = radius * (inner if inner and step % 2 else 1.1)
            angle = 2 * math.pi * step / steps - math.pi / 2
            points.append((centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle)))
        draw.polygon(points, fill=colour)

    return drawn


_DRAW: dict[str, Draw] = {
    "circle": _circle,
    "square": _square,
    "ring": _ring,
    "cross": _cross,
    "triangle": _polygon(3, 0),
    "star": _polygon(5, 0.45),
}
