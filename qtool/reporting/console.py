"""The report for a terminal, with the verdict last; text of artefacts and panels is shown without control characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.checks.findings import printable
from qtool.reporting.words import (
    GATE_COLUMNS,
    INTERVALS,
    STAGE_COLUMNS,
    bound,
    duration,
    gates_title,
    headline,
    interval,
    metric_names,
    number,
    signed,
    size,
)
from qtool.verify.metrics import label
from qtool.verify.report import PairDelta, PanelReport, Report

_STYLE: Final = {"pass": "green", "fail": "bold red", "inconclusive": "bold yellow", "ungated": "yellow"}
_WORST_SHOWN: Final = 5
_LONGEST: Final = 1000


def render_console(report: Report) -> RenderableType:
    """Stages, metrics by panel, the worst pairs, the gates, the verdict."""
    parts: list[RenderableType] = []
    if report.stages:
        parts.append(_stages(report))
    if report.panels:
        parts.append(_metrics(report))
    parts += [_worst(panel) for panel in report.panels if panel.worst]
    if report.gates:
        parts.append(_gates(report))
    return Group(*parts, verdict_line(report))


def verdict_line(report: Report) -> Text:
    """The verdict in one sentence."""
    verdict = report.verdict.value
    return Text(f"{verdict.upper()}: {printable(headline(report), _LONGEST)}", style=_bold(verdict))


def _bold(outcome: str) -> str:
    return f"bold {_STYLE[outcome].removeprefix('bold ')}"


def _stages(report: Report) -> Table:
    table = Table(title="Stages", title_justify="left")
    for column in STAGE_COLUMNS[:-1]:
        table.add_column(column)
    table.add_column(STAGE_COLUMNS[-1], justify="right", no_wrap=True)
    for stage in report.stages:
        lines = [stage.summary, *(f"{each.code}: {each.sentence}" for each in stage.findings)]
        summary = Text("\n".join(printable(line, _LONGEST) for line in lines))
        table.add_row(Text(printable(stage.name)), _outcome(stage.outcome.value), summary, duration(stage.seconds))
    return table


def _metrics(report: Report) -> Table:
    table = Table(title="Metrics", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for panel in report.panels:
        table.add_column(Text("\n".join((printable(panel.name), *size(panel)))), justify="right", no_wrap=True)
    for metric in metric_names(report):
        table.add_row(Text(printable(label(metric))), *(_value(panel, metric) for panel in report.panels))
    if any(panel.intervals for panel in report.panels):
        table.caption = f"Below the values: {INTERVALS}."
    return table


def _value(panel: PanelReport, metric: str) -> Text:
    cell = Text(number(panel.metrics.get(metric)))
    ends = panel.intervals.get(metric)
    return cell.append(f"\n{interval(ends)}", style="dim") if ends else cell


def _worst(panel: PanelReport) -> Table:
    table = Table(title=Text(f"Worst pairs of {printable(panel.name)}"), title_justify="left", expand=True)
    columns: dict[str, Callable[[PairDelta], str]] = {
        "query": lambda pair: f"{pair.query_id}: {pair.query}",
        "document": lambda pair: f"{pair.document_id}: {pair.document}",
        "label": lambda pair: "" if pair.label is None else f"{pair.label:g}",
        "reference": lambda pair: signed(pair.reference),
        "artefact": lambda pair: signed(pair.artefact),
        "Δ": lambda pair: signed(pair.delta),
    }
    for name in columns:
        if name in ("query", "document"):
            table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1)  # shortened, the numbers are not
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for pair in panel.worst[:_WORST_SHOWN]:
        # As Text, so that rich reads no markup in a query.
        table.add_row(*(Text(printable(cell(pair), _LONGEST)) for cell in columns.values()))
    return table


def _gates(report: Report) -> Table:
    table = Table(title=Text(printable(gates_title(report))), title_justify="left")
    for column in GATE_COLUMNS:
        table.add_column(column)
    for gate in report.gates:
        table.add_row(
            Text(printable(label(gate.metric))),
            Text(printable(gate.panel)),
            bound(gate),
            _outcome(gate.outcome.value),
            Text(printable(gate.reason, _LONGEST)),
        )
    return table


def _outcome(outcome: str) -> Text:
    return Text(outcome, style=_STYLE.get(outcome, "dim"))
