"""Small drawings of landscapes, each with the sentence that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 384, 288
HORIZON = 168
SKIES = {"day": "#bcd9ee", "dusk": "#e3a78e", "night": "#22304c"}
COLOURS = {"red": "#b8392e", "blue": "#1f5fa8", "yellow": "#d8b020", "white": "#f4f4f4", "brown": "#77502f"}
THINGS = ("house", "tree", "boat", "tower", "fence", "rock")
COUNTS = ("no", "one", "two", "three")


@dataclass(frozen=True)
class Drawing:
    """A picture, what it shows, and how somebody would search for it."""

    picture: Image.Image
    description: str
    query: str


def draw_landscape(seed: int) -> Drawing:
    """Sky, ground or water, and one to three of two kinds of things."""
    random = Random(seed)
    time, colour = random.choice(list(SKIES)), random.choice(list(COLOURS))
    water = random.random() < 0.4
    kinds = random.sample([thing for thing in THINGS if water or thing != "boat"], 2)
    counts = [random.randint(1, 3) for _ in kinds]
    image = Image.new("RGB", (WIDTH, HEIGHT), SKIES[time])
    draw = ImageDraw.Draw(image)
    _draw_sky(draw, random, time)
    draw.rectangle((0, HORIZON, WIDTH, HEIGHT), fill="#5c8fb0" if water else random.choice(["#6b8f4e", "#b59f68"]))
    places = random.sample(range(7), sum(counts))
    each = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    for kind, place in zip(each, places, strict=True):
        _draw_thing(
            draw, kind, 28 + 52 * place, HORIZON + random.randint(12, 96), random.randint(18, 32), COLOURS[colour]
        )
    named = [f"{COUNTS[count]} {colour} {_plural(kind, count)}" for kind, count in zip(kinds, counts, strict=True)]
    ground = "by the water" if water else "on dry land"
    description = f"A drawing of {' and '.join(named)} {ground}, at {time}."
    return Drawing(image, description, f"{_plural(kinds[0], counts[0])} {ground}")


def _plural(kind: str, count: int) -> str:
    return kind if count == 1 else f"{kind}s"


def _draw_sky(draw: ImageDraw.ImageDraw, random: Random, time: str) -> None:
    x = random.randint(40, WIDTH - 40)
    if time == "night":
        for _ in range(24):
            left, top = random.randint(0, WIDTH), random.randint(0, HORIZON - 20)
            draw.ellipse((left, top, left + 2, top + 2), fill="#f4f4f4")
        draw.ellipse((x - 14, 22, x + 14, 50), fill="#e8e4d0")
        return
    height = 30 if time == "day" else 116
    draw.ellipse((x - 18, height, x + 18, height + 36), fill="#f0d060" if time == "day" else "#d8602a")
    peak = random.randint(60, WIDTH - 60)
    draw.polygon([(peak - 120, HORIZON), (peak, random.randint(70, 110)), (peak + 120, HORIZON)], fill="#7d8794")


def _draw_thing(draw: ImageDraw.ImageDraw, kind: str, x: int, y: int, size: int, colour: str) -> None:
    """One thing that stands at (x, y), `size` pixels to each side."""
    if kind == "house":
        draw.rectangle((x - size, y - size, x + size, y), fill=colour, outline="#303030")
        draw.polygon([(x - size - 4, y - size), (x, y - 2 * size), (x + size + 4, y - size)], fill="#4a3a34")
        draw.rectangle((x - 4, y - size // 2, x + 4, y), fill="#303030")
    elif kind == "tree":
        draw.rectangle((x - 3, y - size, x + 3, y), fill="#5a4030")
        draw.ellipse((x - size * 2 // 3, y - 2 * size, x + size * 2 // 3, y - size // 2), fill=colour)
    elif kind == "boat":
        draw.polygon(
            [(x - size, y - 8), (x + size, y - 8), (x + size // 2, y + 4), (x - size // 2, y + 4)], fill=colour
        )
        draw.polygon([(x, y - 10), (x, y - 2 * size), (x + size * 2 // 3, y - 10)], fill="#f4f4f4")
    elif kind == "tower":
        draw.rectangle((x - size // 3, y - 2 * size, x + size // 3, y), fill=colour, outline="#303030")
        draw.rectangle((x - size // 2, y - 2 * size - 6, x + size // 2, y - 2 * size), fill="#303030")
    elif kind == "fence":
        for post in range(x - size, x + size + 1, 9):
            draw.rectangle((post, y - size // 2, post + 3, y), fill=colour)
        draw.line((x - size, y - size // 3, x + size, y - size // 3), fill=colour, width=2)
    else:
        points = [(x - size, y), (x - size // 2, y - size // 2), (x + size // 4, y - size * 2 // 3), (x + size, y)]
        draw.polygon(points, fill=colour)
