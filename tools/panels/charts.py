"""Small tables as bar, line and pie charts with a title, axes and labels."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageDraw

from tools.panels.pages import COLOURS, INK, PAPER, draw_text, text_width
from tools.panels.sources import Chart

WIDTH, HEIGHT = 400, 272
_SIZE = 13
_TITLE = 16
_GRID = "#d8d8d8"
_AXIS = "#555555"
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class _Axes(NamedTuple):
    """The place of the plot, and the values at its lower and upper edge."""

    left: int
    top: int
    right: int
    bottom: int
    low: float
    high: float

    def y(self, value: float) -> float:
        """How far down a value is."""
        return self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low)

    def x(self, place: int, count: int) -> float:
        """The middle of the `place`-th of `count` columns."""
        return self.left + (self.right - self.left) * (place + 0.5) / count


def draw_chart(chart: Chart) -> Image.Image:
    """The chart as a picture."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    _centred(draw, WIDTH / 2, 8, chart.title, _TITLE)
    colour = COLOURS[len(chart.title) % len(COLOURS)]
    if chart.type == "pie":
        _draw_pie(draw, chart.data)
        return image
    axes = _draw_axes(draw, chart)
    if chart.type == "bar":
        _draw_bars(draw, axes, list(chart.data.values()), colour)
    else:
        _draw_line(draw, axes, list(chart.data.values()), colour)
    return image


def _draw_axes(draw: ImageDraw.ImageDraw, chart: Chart) -> _Axes:
    """Axes with grid and labels; from zero, unless a line chart's values are below it."""
    low, high = min(0.0, *chart.data.values()), max(chart.data.values())
    step = next(step for step in _STEPS if step * 6 >= high - low)
    ticks = range(int(low // step) * step, int(-(-high // step)) * step + 1, step)
    axes = _Axes(52, 52, WIDTH - 12, HEIGHT - 46, ticks[0], ticks[-1])
    for tick in ticks:
        y = axes.y(tick)
        draw.line((axes.left, y, axes.right, y), fill=_AXIS if tick == 0 else _GRID)
        draw_text(draw, (axes.left - 6 - text_width(str(tick), _SIZE), y - 8), str(tick), _SIZE)
    draw.line((axes.left, axes.top, axes.left, axes.bottom), fill=_AXIS)
    draw_text(draw, (8, 32), chart.y, _SIZE)
    for place, label in enumerate(chart.data):
        _centred(draw, axes.x(place, len(chart.data)), axes.bottom + 4, label, _SIZE)
    _centred(draw, (axes.left + axes.right) / 2, HEIGHT - 22, chart.x, _SIZE)
    return axes


def _draw_bars(draw: ImageDraw.ImageDraw, axes: _Axes, values: list[float], colour: str) -> None:
    half = (axes.right - axes.left) / len(values) * 0.32
    for place, value in enumerate(values):
        x = axes.x(place, len(values))
        draw.rectangle((round(x - half), round(axes.y(value)), round(x + half), round(axes.y(0))), fill=colour)


def _draw_line(draw: ImageDraw.ImageDraw, axes: _Axes, values: list[float], colour: str) -> None:
    points = [(round(axes.x(place, len(values))), round(axes.y(value))) for place, value in enumerate(values)]
    draw.line(points, fill=colour, width=2)
    for x, y in points:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _draw_pie(draw: ImageDraw.ImageDraw, data: dict[str, float]) -> None:
    """Sectors clockwise from the top, explained by a legend with the shares in per cent."""
    angle, total = -90.0, sum(data.values())
    for place, (label, value) in enumerate(data.items()):
        end = angle + 360 * value / total
        draw.pieslice((24, 52, 224, 252), angle, end, fill=COLOURS[place], outline=PAPER, width=2)
        y = 88 + 34 * place
        draw.rectangle((252, y, 266, y + 14), fill=COLOURS[place])
        draw_text(draw, (274, y - 2), f"{label} {value:g} %", _SIZE + 1)
        angle = end


def _centred(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int) -> None:
    draw_text(draw, (x - text_width(text, size) / 2, y), text, size, INK)
