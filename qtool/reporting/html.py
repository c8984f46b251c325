"""The report as one HTML file without scripts that loads nothing; its Content-Security-Policy forbids both.

The template escapes every value; a picture is shown only if it is a `data:` URL of a picture.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

from qtool.reporting import plots, words
from qtool.verify.report import Report

if TYPE_CHECKING:
    from jinja2 import Template

WORST_SHOWN: Final = 6
WEIGHTS_SHOWN: Final = 8
_PICTURE: Final = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")


def render_html(report: Report) -> str:
    """The whole page."""
    unit = "log-odds" if report.task == "rerank" else "similarity"
    return _template().render(
        report=report,
        words=words,
        style=Markup(_beside("report.css")),  # noqa: S704 - our own file
        scores=[
            (panel, plots.scatter(panel, unit), plots.histogram(panel, unit, report.noise)) for panel in report.panels
        ],
        modalities=plots.modalities(report),
        layers=plots.layers(report.weights),
        worst_shown=WORST_SHOWN,
        weights_shown=WEIGHTS_SHOWN,
        is_picture=_PICTURE.fullmatch,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment.from_string(_beside("report.html.jinja"))


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
