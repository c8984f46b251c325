"""The general calibration sets: a query from each title, and a text, page, chart or drawing as its document.

Every text is the document of one query. One half belong to their query; the documents of the other half are exchanged
within their language, so that a reranker answers yes and no. The order follows from hashes: the first queries are a
mixture, and a text that is added later moves few others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from qtool import resources
from qtool.inputs.panels import panel_header
from tools.calibration.drawings import draw_landscape
from tools.calibration.sources import load_sources, load_texts
from tools.panels.build import BuiltPanel, picture_path
from tools.panels.charts import draw_chart
from tools.panels.pages import draw_page, to_palette
from tools.panels.sources import LATIN, Chart

CALIBRATION = resources.path("calibration")
TEXT = "general-text"
PICTURES = "general-pictures"
PAGES, DRAWINGS = 120, 60
_PAGE_LENGTH = 620
FORMS = ("image", "both", "image", "both", "text")
"""A document of the second set shows its picture, its picture and a text, or the text alone."""


@dataclass(frozen=True)
class Sheet:
    """A document: its query, its language, a text and, in the second set, a picture."""

    id: str
    language: str
    query: str
    text: str
    picture: Image.Image | None = field(default=None, compare=False)


def build_text_set() -> BuiltPanel:
    """Queries and documents as texts, in every language."""
    sheets = [Sheet(text.id, text.language, text.title, text.text) for text in load_texts()]
    return BuiltPanel(TEXT, _content(TEXT, "text", [(sheet, {"text": sheet.text}) for sheet in _mixed(sheets)]), {})


def build_picture_set() -> BuiltPanel:
    """Pages, charts and drawings, and pairs of these with texts."""
    sheets = _mixed([*_pages(), *_charts(), *_drawings()])
    pictures = {
        picture_path(sheet.id, sheet.picture, PICTURES): sheet.picture for sheet in sheets if sheet.picture is not None
    }
    shown = [(sheet, _shown(sheet, FORMS[number % len(FORMS)])) for number, sheet in enumerate(sheets)]
    named = {content["image"] for _, content in shown if "image" in content}
    kept = {path: picture for path, picture in pictures.items() if path in named}
    return BuiltPanel(PICTURES, _content(PICTURES, "mixed", shown), kept)


def provenance() -> str:
    """The page that says where all texts come from, with the notices of their licences."""
    rows = "".join(
        f"| {source.name} | {source.content} | {source.license} | {source.copyright} | {_package(source)} |\n"
        for source in load_sources()
    )
    notices = "".join(
        f"\n## {source.name}\n\nCopyright (c) {source.copyright}.\n\n{source.notice}"
        for source in load_sources()
        if source.notice
    )
    return f"{_PROVENANCE}{rows}{notices}"


_PROVENANCE = """\
# Where the calibration sets come from

Written by `python -m tools.calibration`. `general-text` and `general-pictures` hold the texts below; titles and summary
lines became queries. Pages are such texts, drawn with Pillow's built-in font (Aileron, CC0). `demo-calibration` is made
of training scenes of the demo models (CC0-1.0). The licence of each set and the SHA-256 of its lines are in its header,
and pictures are named by a hash of their pixels. Apache-2.0 is in the file LICENSE of qtool.

| source | content | licence | copyright | taken from |
|---|---|---|---|---|
"""


def _package(source: Any) -> str:
    return f"{source.package} {f'(SHA-256 {source.sha256[:16]}…)' if source.sha256 else ''}".strip() or "this project"


def _pages() -> Iterator[Sheet]:
    drawable = [text for text in load_texts() if text.language in LATIN and text.source != "django-messages"]
    found = 0
    for text in sorted(drawable, key=lambda text: _digest("pages", text.id)):
        body = _first_sentences(text.text)
        if found == PAGES or not body:
            continue
        try:
            page = draw_page(text.title, body, None, int(_digest("style", text.id), 16))
        except ValueError:  # a letter that the font does not have
            continue
        if len(text.title) <= 44:  # a longer heading runs over the edge
            found += 1
            yield Sheet(f"page-{text.id}", text.language, text.title, body, to_palette(page))


def _first_sentences(text: str) -> str:
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text[:_PAGE_LENGTH])]
    return text[: ends[-1]].strip() if len(text) > _PAGE_LENGTH and ends else text if len(text) <= _PAGE_LENGTH else ""


def _charts() -> Iterator[Sheet]:
    for number, (language, title, x, y, labels, scale) in enumerate(CHARTS):
        for kind in ("bar", "line") if number % 3 else ("bar", "pie"):
            values = _values(f"{title}/{kind}", len(labels), scale, is_pie=kind == "pie")
            data = dict(zip(labels, values, strict=True))
            names = {"x": "", "y": ""} if kind == "pie" else {"x": x, "y": y}
            chart = Chart(type=kind, title=title, data=data, **names)
            told = ", ".join(f"{label} {value:g}" for label, value in data.items())
            yield Sheet(
                f"chart-{number}-{kind}", language, f"{title}: {max(data, key=lambda label: data[label])}",
                f"{title} ({y}): {told}.", to_palette(draw_chart(chart)),
            )  # fmt: skip


def _values(seed: str, count: int, scale: int, *, is_pie: bool) -> list[int]:
    drawn = [int(_digest(seed, str(place))[:8], 16) % scale + max(scale // 8, 1) for place in range(count)]
    if not is_pie:
        return drawn
    shares = [round(100 * value / sum(drawn)) for value in drawn[:-1]]
    return [*shares, 100 - sum(shares)]


def _drawings() -> Iterator[Sheet]:
    for number in range(DRAWINGS):
        drawing = draw_landscape(number)
        yield Sheet(f"drawing-{number}", "en", drawing.query, drawing.description, drawing.picture)


def _shown(sheet: Sheet, form: str) -> dict[str, str]:
    content = {"text": sheet.text} if form != "image" else {}
    if form != "text" and sheet.picture is not None:
        content["image"] = picture_path(sheet.id, sheet.picture, PICTURES)
    return content


def _content(name: str, modality: str, shown: Sequence[tuple[Sheet, dict[str, str]]]) -> bytes:
    """The whole file: a header line with the hash of the rest, then one line a query."""
    partners = _partners([sheet for sheet, _ in shown])
    contents = {sheet.id: content for sheet, content in shown}
    lines = ""
    for sheet, _ in shown:
        other = partners[sheet.id]
        document = {"id": other, **contents[other], "label": int(other == sheet.id)}
        lines += json.dumps(
            {"id": sheet.id, "query": {"text": sheet.query}, "documents": [document]}, ensure_ascii=False
        )
        lines += "\n"
    licences = " AND ".join(dict.fromkeys(source.license for source in load_sources()))
    about = {"license": licences, "modality": modality, "labels": "binary", "instruction": None}
    return panel_header(lines.encode(), name=name, **about) + lines.encode()


def _partners(sheets: Sequence[Sheet]) -> dict[str, str]:
    """The document of each query by id: its own, or, for every other two of a language, each other's."""
    partners = {sheet.id: sheet.id for sheet in sheets}
    for language in {sheet.language for sheet in sheets}:
        own = [sheet.id for sheet in sheets if sheet.language == language]
        for one, other in zip(own[::4], own[2::4], strict=False):
            partners[one], partners[other] = other, one
    return partners


def _mixed(sheets: Sequence[Sheet]) -> list[Sheet]:
    return sorted(sheets, key=lambda sheet: _digest("order", sheet.id))


def _digest(seed: str, key: str) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


CHARTS = (
    ("en", "Visitors of the swimming hall", "Weekday", "Persons", ("Mon", "Tue", "Wed", "Thu", "Fri"), 400),
    ("en", "Letters posted in Kelmore", "Month", "Thousand", ("Jan", "Feb", "Mar", "Apr", "May", "Jun"), 60),
    ("en", "Bird species seen on the island", "Year", "Species", ("2021", "2022", "2023", "2024"), 90),
    ("en", "Repairs by kind", "Kind", "Number", ("Pump", "Valve", "Sensor", "Cable"), 50),
    ("en", "Height of the river at the old bridge", "Week", "Centimetres", ("1", "2", "3", "4", "5", "6"), 300),
    ("de", "Verkaufte Fahrkarten", "Monat", "Tausend", ("Jan", "Feb", "Mrz", "Apr", "Mai"), 80),
    ("de", "Laufzeit der Batterien", "Modell", "Stunden", ("A1", "A2", "B1", "B2"), 40),
    ("de", "Mitglieder des Ruderclubs", "Jahr", "Personen", ("2020", "2021", "2022", "2023", "2024"), 250),
    ("fr", "Bateaux au port de Kervan", "Mois", "Bateaux", ("Mai", "Juin", "Juil", "Sept"), 120),
    ("fr", "Heures de soleil par saison", "Saison", "Heures", ("Hiver", "Print.", "Automne"), 700),
    ("fr", "Livraisons du jour", "Heure", "Colis", ("8 h", "10 h", "12 h", "14 h", "16 h"), 50),
    ("es", "Cosecha de naranjas", "Finca", "Toneladas", ("Norte", "Sur", "Este", "Oeste"), 90),
    ("es", "Pasajeros del tranvía", "Línea", "Miles", ("L1", "L2", "L3", "L4", "L5"), 60),
    ("it", "Spettatori della stagione", "Mese", "Persone", ("Ott", "Nov", "Dic", "Gen", "Feb"), 500),
    ("pt", "Consumo de papel no arquivo", "Ano", "Resmas", ("2021", "2022", "2023", "2024"), 200),
)
"""Language, title, axes, labels and size of invented tables; each is drawn twice, with other numbers."""
