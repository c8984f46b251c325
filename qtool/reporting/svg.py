"""Drawings as SVG text: a frame with axes, and what is drawn inside it.

Rule: colours are CSS classes of the page, so that a drawing follows it into the dark; every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

WIDTH: Final = 360
"""Of every drawing: what a phone shows without shrinking it, so that 11-pixel letters stay readable."""
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 40


@dataclass(frozen=True)
class Axis:
    """A range of numbers laid on a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round numbers inside the range, 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
        return [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Frame:
    """A plot's area between its two axes."""

    x: Axis
    y: Axis
    height: int

    @classmethod
    def around(cls, x: tuple[float, float], y: tuple[float, float], height: int = 260) -> Frame:
        """A frame of the usual width that shows both ranges; an empty range is widened."""
        return cls(Axis(*_wide(x), LEFT, WIDTH - RIGHT), Axis(*_wide(y), height - BOTTOM, TOP), height)

    def axes(self, x_title: str, y_title: str, *, whole: str = "") -> Markup:
        """Grid, numbers and titles; an axis named in `whole` counts things and is numbered by whole numbers alone."""
        below = self.height - BOTTOM
        across, up = (
            [value for value in axis.ticks() if name not in whole or value == int(value)]
            for name, axis in (("x", self.x), ("y", self.y))
        )
        parts = [line((LEFT, self.y.at(v)), (WIDTH - RIGHT, self.y.at(v)), "grid") for v in up]
        parts += [line((LEFT, below), (WIDTH - RIGHT, below), "axis")]
        parts += [text(LEFT - 6, self.y.at(v) + 4, f"{v:.10g}", "end") for v in up]
        parts += [text(self.x.at(v), below + 15, f"{v:.10g}") for v in across]
        parts += [text((LEFT + WIDTH - RIGHT) / 2, self.height - 6, x_title, kind="title")]
        middle = (TOP + below) / 2
        turned = Markup(
            '<text class="title" text-anchor="middle" transform="translate(11 {:.1f}) rotate(-90)">{}</text>'
        )
        return join([*parts, turned.format(middle, y_title)])

    def dots(self, points: Iterable[tuple[float, float]], kind: str) -> Markup:
        """One path for all points; those that share a place of the screen are drawn once, so that size is bounded."""
        places = sorted({(round(self.x.at(x)), round(self.y.at(y))) for x, y in points})
        path = Markup("").join(Markup("M{} {}h0").format(x, y) for x, y in places)
        return Markup('<path class="dots {}" d="{}"/>').format(kind, path) if places else Markup("")


def drawing(title: str, description: str, height: int, *parts: Markup) -> Markup:
    """A whole SVG element, with its name and what a reader who does not see it should know."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>')
    return head.format(WIDTH, height, title, description) + join(parts) + Markup("</svg>")


def line(start: tuple[float, float], end: tuple[float, float], kind: str) -> Markup:
    """A straight line."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, *start, *end)


def path(points: Iterable[tuple[float, float]], kind: str) -> Markup:
    """Straight lines through the points."""
    steps = Markup("L").join(Markup("{:.1f} {:.1f}").format(x, y) for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(kind, steps)


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> Markup:
    """A filled rectangle; the title shows under a pointer."""
    shape = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
    return shape.format(kind, x, y, max(width, 0), max(height, 0), _title(title))


def ring(x: float, y: float, kind: str, title: str) -> Markup:
    """A small circle around a point; the title shows under a pointer."""
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5">{}</circle>').format(kind, x, y, _title(title))


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "tick") -> Markup:
    """A line of text."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def join(parts: Iterable[Markup]) -> Markup:
    """The parts one after the other."""
    return Markup("").join(parts)


def _title(words: str) -> Markup:
    return Markup("<title>{}</title>").format(words) if words else escape("")


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if high > low:
        return low, high
    pad = abs(low) * 0.1 or 1.0
    return low - pad, high + pad
