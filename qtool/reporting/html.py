"""The report as one HTML file without scripts that loads nothing; its Content-Security-Policy forbids both.

The template escapes every value; a picture is shown only if it is a `data:` URL of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from qtool.console import human_size
from qtool.progress import duration
from qtool.reporting import comparison_plots, plots, words
from qtool.verify.meanings import meaning
from qtool.verify.paired import ComparedPanel, Comparison
from qtool.verify.report import PanelReport, Report

if TYPE_CHECKING:
    from jinja2 import Environment

WORST_SHOWN: Final = 6
WEIGHTS_SHOWN: Final = 8
_PICTURE: Final = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")


def render_html(report: Report, comparison: Comparison | None = None) -> str:
    """The whole page; with a comparison, also what was verified beside the artefact."""
    unit = "log-odds" if report.task == "rerank" else "similarity"
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            **_compared(comparison),
            panels=[_panel(report, panel, unit) for panel in report.panels],
            modalities=plots.modalities(report),
            layers=plots.layers(report.weights),
            worst_shown=WORST_SHOWN,
            weights_shown=WEIGHTS_SHOWN,
            is_picture=_PICTURE.fullmatch,
        )
    )


def render_comparison(comparison: Comparison) -> str:
    """The whole page of a comparison."""
    return _environment().get_template("compare.html.jinja").render(_compared(comparison))


@dataclass(frozen=True)
class _ComparedPanel:
    """What a page shows of a panel of a comparison."""

    of: ComparedPanel
    names: Sequence[str]
    drifts: Markup | None
    differences: Markup | None


def _compared(comparison: Comparison | None) -> Mapping[str, Any]:
    """What the templates need to show a comparison."""
    if comparison is None:
        return {"comparison": None}
    names, shown = words.labels(comparison), words.KEY_METRICS.get(comparison.task, ())
    panels = [
        _ComparedPanel(
            panel,
            names,
            comparison_plots.drifts(comparison, panel, names),
            comparison_plots.differences(panel, names, shown),
        )
        for panel in comparison.panels
    ]
    return {"comparison": comparison, "compared": panels, "shown": shown, "tones": comparison_plots.TONES}


@dataclass(frozen=True)
class _Panel:
    """What the page shows of a panel."""

    report: PanelReport
    rows: Sequence[words.MetricRow]
    gates: Markup | None
    plots: Sequence[tuple[Markup, str]]


def _panel(report: Report, panel: PanelReport, unit: str) -> _Panel:
    rows = words.metric_rows(report, panel)
    noise = f" The band is the noise of {report.noise.dtype} (p99)." if report.noise else ""
    pairs = f"Δ, artefact minus reference, of every pair. On the line both score alike.{noise} Rings: the worst pairs."
    drawings = (
        (plots.differences(panel, unit, report.noise), pairs),
        (plots.histogram(panel, unit, report.noise), f"How many pairs differ by how much.{noise}"),
    )
    shown = [(drawing, caption) for drawing, caption in drawings if drawing is not None]
    return _Panel(panel, rows, plots.gates(rows, panel.name), shown)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    style = Markup((here / "report.css").read_text(encoding="utf-8"))  # noqa: S704 - our own file
    environment.globals.update(words=words, duration=duration, human_size=human_size, style=style, meaning=meaning)
    return environment
