"""Text as a printed page: Latin script with its accents, drawn with the font that Pillow has inside.

The font (Aileron, CC0) has the letters of ASCII and loose accents but no accented letter, so that those are put together here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = "#101010", "#ffffff"
COLOURS = ("#1f5fa8", "#c8501e", "#2f8f4e", "#7a4a9e", "#b08a10", "#5a6b78")
_GREYS = ("#000000", "#555555", "#aaaaaa", "#d8d8d8", "#ffffff", "#f2efe4")
_TINTS = ("#8fafd3", "#e3a78e", "#97c7a6", "#bca4ce")
PALETTE = (*_GREYS, *COLOURS, *_TINTS)

SUBSTITUTES = {"ß": "ss", "œ": "oe"}
_MARKS = {
    "\u0300": ("`", 1.2),
    "\u0301": ("\u00b4", 1.2),
    "\u0302": ("^", 0.7),
    "\u0303": ("~", 0.9),
    "\u0308": ("..", 0.9),
    "\u0327": (",", 0.8),
}
"""The glyph that stands for a combining accent, and its size as a share of the letter's."""
_BELOW = "\u0327"


class Style(NamedTuple):
    """How a source sets its pages."""

    width: int
    size: int
    has_bar: bool
    paper: str
    colour: str


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    """The built-in font. Raises RuntimeError where Pillow was built without FreeType."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        message = "Pillow has no FreeType here, so that it cannot scale its font."
        raise RuntimeError(message)  # noqa: TRY004 - not a wrong argument
    return loaded


def draw_text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: str = INK) -> None:
    """Write one line, whose top left corner is `at`."""
    x, y = at
    for letters, marks in _clusters(text):
        if marks:
            _draw_marked(draw, (round(x), round(y)), letters, marks, size, fill)
        else:
            draw.text((round(x), round(y)), letters, fill=fill, font=font(size))
        x += _advance(letters, size)


@cache
def text_width(text: str, size: int) -> float:
    """The width of a line in pixels."""
    return sum(_advance(letters, size) for letters, _ in _clusters(text))


def wrap(text: str, size: int, width: float) -> list[str]:
    """The lines of a paragraph that is `width` pixels wide."""
    lines: list[str] = []
    used = width
    for word in text.split():
        needed = text_width(f" {word}", size)
        if used + needed > width:
            lines.append(word)
            used = needed
        else:
            lines[-1] += f" {word}"
            used += needed
    return lines


def draw_page(heading: str, text: str, table: Sequence[Sequence[str | int]] | None, style: int) -> Image.Image:
    """A heading, a paragraph and perhaps a table; `style` chooses width, size of type, paper and colour."""
    chosen = _style(style)
    margin, step = chosen.size, round(chosen.size * 1.4)
    lines = wrap(text, chosen.size, chosen.width - 2 * margin)
    rows = [[str(cell) for cell in row] for row in table or ()]
    top = 3 * chosen.size + margin
    height = top + step * len(lines) + margin + (len(rows) * (step + 4) + margin if rows else 0)
    image = Image.new("RGB", (chosen.width, height), chosen.paper)
    draw = ImageDraw.Draw(image)
    _draw_heading(draw, heading, chosen)
    for number, line in enumerate(lines):
        draw_text(draw, (margin, top + number * step), line, chosen.size)
    if rows:
        _draw_table(draw, rows, (margin, top + step * len(lines) + margin // 2), chosen, step + 4)
    return image


def to_palette(image: Image.Image) -> Image.Image:
    """The picture in `PALETTE`, each pixel in the nearest colour; in a PNG that is four bits each."""
    palette = Image.new("P", (1, 1))
    palette.putpalette([int(colour[place : place + 2], 16) for colour in PALETTE for place in (1, 3, 5)])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def _style(number: int) -> Style:
    return Style(
        width=(400, 432, 464)[number % 3],
        size=(14, 15)[number // 3 % 2],
        has_bar=number // 6 % 2 == 0,
        paper=(PAPER, PAPER, _GREYS[5])[number // 12 % 3],
        colour=COLOURS[number // 36 % 6],
    )


def _draw_heading(draw: ImageDraw.ImageDraw, heading: str, style: Style) -> None:
    margin, size = style.size, style.size + 3
    if style.has_bar:
        draw.rectangle((0, 0, style.width, 2 * size), fill=style.colour)
        draw_text(draw, (margin, size // 2), heading, size, PAPER)
    else:
        draw_text(draw, (margin, size // 2 + 2), heading, size, style.colour)
        draw.line((margin, 2 * size, style.width - margin, 2 * size), fill=style.colour, width=1)


def _draw_table(
    draw: ImageDraw.ImageDraw, rows: list[list[str]], at: tuple[int, int], style: Style, height: int
) -> None:
    """A ruled table, whose first row is a head."""
    left, top = at
    widths = [max(text_width(cell, style.size) for cell in column) + 16 for column in zip(*rows, strict=True)]
    right = round(left + sum(widths))
    draw.rectangle((left, top, right, top + height), fill="#d8d8d8")
    for number, row in enumerate(rows):
        y = top + number * height
        draw.rectangle((left, y, right, y + height), outline="#555555")
        for column, cell in enumerate(row):
            draw_text(draw, (left + sum(widths[:column]) + 8, y + 3), cell, style.size)


def _advance(letters: str, size: int) -> float:
    """How far a run moves the pen; the font's own space is so narrow at this size that words run together."""
    return len(letters) * round(size * 0.36) if letters.isspace() else font(size).getlength(letters)


def _clusters(text: str) -> Iterator[tuple[str, str]]:
    """Runs of spaces, of letters without accents, and letters with theirs. Raises ValueError for what cannot be drawn."""
    for letter, other in SUBSTITUTES.items():
        text = text.replace(letter, other)
    letters: list[tuple[str, str]] = []
    for character in unicodedata.normalize("NFD", text):
        if character in _MARKS and letters:
            letters[-1] = letters[-1][0], letters[-1][1] + character
        elif _is_in_font(character):
            letters.append((character, ""))
        else:
            message = f"The built-in font has no {character!r} (U+{ord(character):04X})."
            raise ValueError(message)
    for kind, run in groupby(letters, key=lambda letter: "space" if letter[0] == " " else bool(letter[1])):
        if kind is True:
            yield from run
        else:
            yield "".join(letter for letter, _ in run), ""


@cache
def _is_in_font(character: str) -> bool:
    return character == " " or bytes(font(20).getmask(character)) != bytes(font(20).getmask("\uffff"))


def _draw_marked(draw: ImageDraw.ImageDraw, at: tuple[int, int], letter: str, marks: str, size: int, fill: str) -> None:
    left, top, _, bottom = (round(edge) for edge in draw.textbbox(at, letter, font=font(size)))
    glyph = _ink(letter, size)
    if letter == "i":  # its dot gives way to the accent
        glyph = glyph.crop((0, glyph.height - _ink("x", size).height, glyph.width, glyph.height))
        top = bottom - glyph.height
    draw.bitmap((left, top), glyph, fill=fill)
    for mark in marks:
        text, share = _MARKS[mark]
        accent = _ink(text, round(size * share))
        y = bottom - 1 if mark == _BELOW else top - 1 - accent.height
        draw.bitmap((left + (glyph.width - accent.width) // 2, y), accent, fill=fill)


def _ink(text: str, size: int) -> Image.Image:
    """The glyphs as a mask, cut to what is inked: Pillow's own box of an accent reaches down to the baseline."""
    mask = font(size).getmask(text, mode="L")
    glyphs = Image.frombytes("L", mask.size, bytes(mask))
    return glyphs.crop(glyphs.getbbox())
