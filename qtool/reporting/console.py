"""The report for a terminal of 80 columns: no number is cut, and the verdict comes last.

Text of artefacts and panels is shown without control characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from qtool.checks.findings import Finding, printable
from qtool.checks.stage import Stage
from qtool.console import unwrapped
from qtool.progress import duration
from qtool.reporting.words import (
    APART,
    INTERVALS,
    MetricRow,
    gates_title,
    has_centred,
    headline,
    interval,
    metric_rows,
    number,
    signed,
    size,
    sizes,
    verdict_title,
)
from qtool.verify.report import PairDelta, PanelReport, Report

_STYLE: Final = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "ungated": "yellow",
    "broken": "bold red",
    "warning": "yellow",
}
_WORST_SHOWN: Final = 3
_LONGEST: Final = 1000
_STAGE, _OUTCOME, _TIME = 10, 12, 8
_METRIC, _VALUE, _INTERVAL, _BOUND = 21, 9, 18, 8
"""Widths: with two spaces between them, a row of metrics has 76 columns; the longest interval has 20, an outcome 12."""


def render_console(report: Report) -> RenderableType:
    """Stages with their findings, a block of metrics and worst pairs for each panel, the verdict."""
    parts = [*_stages(report), *(line for panel in report.panels for line in _panel(report, panel))]
    if any(panel.intervals for panel in report.panels):
        parts += [Text(INTERVALS, style="dim"), Text("")]
    if has_centred(report):
        parts += [Text(APART, style="dim"), Text("")]
    if known := sizes(report):
        parts.append(Text(f"Weights: {known}."))
    return Group(*parts, verdict_line(report))


def verdict_line(report: Report) -> Text:
    """The verdict in one sentence."""
    return Text(
        f"{verdict_title(report, upper=True)}: {printable(headline(report), _LONGEST)}",
        style=_bold(report.verdict.value),
    )


def _bold(outcome: str) -> str:
    return f"bold {_STYLE[outcome].removeprefix('bold ')}"


def _stages(report: Report) -> Iterator[RenderableType]:
    if not report.stages:
        return
    yield Text("Stages", style="bold")
    for stage in report.stages:
        yield from _stage(stage)
    yield Text("")


def _stage(stage: Stage) -> Iterator[RenderableType]:
    took = duration(stage.seconds)
    yield Text.assemble(
        f"  {printable(stage.name):<{_STAGE}}  ",
        (f"{stage.outcome.value:<{_OUTCOME}}", _style(stage.outcome.value)),
        f"  {took:>{_TIME}}" if took else "",
    )
    if not any(stage.summary.startswith(each.sentence) for each in stage.findings):  # it follows with its code
        yield Padding(Text(printable(stage.summary, _LONGEST)), (0, 0, 0, 6), expand=False)
    for each in stage.findings:
        yield from _finding(each)


def _finding(each: Finding) -> Iterator[RenderableType]:
    words = (f"{each.severity.value} ", _style(each.severity.value))
    sentence = f"{printable(each.code)}: {printable(each.sentence, _LONGEST)}"
    yield Padding(Text.assemble(words, sentence), (0, 0, 0, 6), expand=False)
    if each.remedy:
        yield unwrapped(f"        remedy: {printable(each.remedy, _LONGEST)}", "dim")


def _panel(report: Report, panel: PanelReport) -> Iterator[RenderableType]:
    yield Text.assemble((printable(panel.name), "bold"), f": {', '.join(size(panel))}")
    rows = metric_rows(report, panel)
    shown = [row for row in rows if row.is_gated or not row.is_shortened]
    if any(row.is_gated for row in shown):
        yield Text(f"  {printable(gates_title(report))}", style="dim")
    for row, following in zip(shown, [*shown[1:], None], strict=True):
        yield _metric(row)
        if row.outcome not in ("", "pass") and (
            following is None or following.reason != row.reason
        ):  # once for several
            yield Padding(Text(printable(row.reason, _LONGEST)), (0, 0, 0, 6), expand=False)
    if hidden := len(rows) - len(shown):
        yield Text(f"  {hidden} metrics of shortened vectors are in report.json and report.html", style="dim")
    if panel.worst:
        yield Text(f"  Worst pairs of {printable(panel.name)}: reference -> artefact", style="dim")
        yield from (line for pair in panel.worst[:_WORST_SHOWN] for line in _pair(pair))
    yield Text("")


def _metric(row: MetricRow) -> Text:
    """One line that is never wrapped or cut."""
    name, ends = printable(row.name), interval(row.ends)
    line = Text(no_wrap=True, overflow="ignore")
    # A name may go on into the column of values, which stay at its right end.
    value = f"{number(row.value):>{max(_METRIC + 1 + _VALUE - len(name), 1)}}"
    line.append(f"  {name} {value}  {ends:<{_INTERVAL}}")
    if row.is_gated:
        line.append(f"  {row.bound:<{_BOUND}}  ")
        line.append(row.outcome, style=_style(row.outcome))
    line.rstrip()
    return line


def _pair(pair: PairDelta) -> Iterator[Text]:
    label = "" if pair.label is None else f", label {pair.label:g}"
    scores = f"{signed(pair.reference)} -> {signed(pair.artefact)} (Δ {signed(pair.delta)}{label})"
    yield unwrapped(f"    {scores}")
    for side, words in ((pair.query_id, pair.query), (pair.document_id, pair.document)):
        # As Text, so that rich reads no markup in a query; shortened, the numbers above are not.
        yield Text(f"      {printable(f'{side}: {words}', _LONGEST)}", no_wrap=True, overflow="ellipsis")


def _style(outcome: str) -> str:
    return _STYLE.get(outcome, "dim")
