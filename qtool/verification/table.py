"""The report as a person reads it in a terminal.

Rule: the verdict stands last and in words; every number has a name that `docs/verify.md` explains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qtool.verification.gate import Outcome, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtool.verification.report import PairDelta, PanelReport, Report

_LABELS: Final = {
    "log_odds_rmse": "log-odds, RMSE",
    "log_odds_bias": "log-odds, mean shift",
    "log_odds_p50": "log-odds, median |Δ|",
    "log_odds_p95": "log-odds, p95 |Δ|",
    "log_odds_p99": "log-odds, p99 |Δ|",
    "log_odds_max": "log-odds, max |Δ|",
    "cosine_p50": "vectors, median cosine",
    "cosine_p1": "vectors, p1 cosine",
    "cosine_min": "vectors, least cosine",
    "similarity_rmse": "similarity, RMSE",
    "similarity_bias": "similarity, mean shift",
    "similarity_p50": "similarity, median |Δ|",
    "similarity_p95": "similarity, p95 |Δ|",
    "similarity_p99": "similarity, p99 |Δ|",
    "similarity_max": "similarity, max |Δ|",
    "kendall_tau": "Kendall τ-b",
    "top1_agreement": "same document first",
    "ndcg10_reference": "nDCG@10, reference",
    "ndcg10_artefact": "nDCG@10, artefact",
    "ndcg10_drop": "nDCG@10, drop",
}
_STYLE: Final = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.INCONCLUSIVE: "yellow",
    Outcome.SKIPPED: "dim",
}
_WORST_SHOWN: Final = 5


def render(report: Report) -> RenderableType:
    """Metrics by panel, the worst pairs, the gates, the verdict."""
    parts: list[RenderableType] = [_metrics(report)]
    parts += [_worst(panel) for panel in report.panels if panel.worst]
    if report.gates:
        parts.append(_gates(report))
    return Group(*parts, verdict_line(report))


def verdict_line(report: Report) -> Text:
    """The verdict in one sentence."""
    pairs = sum(panel.pairs for panel in report.panels)
    counts = {outcome: sum(gate.outcome is outcome for gate in report.gates) for outcome in Outcome}
    if report.verdict is Verdict.UNGATED:
        return Text(f"UNGATED: {pairs} pairs compared; the recipe sets no gate for them.", style="yellow")
    skipped = f", {counts[Outcome.SKIPPED]} skipped" if counts[Outcome.SKIPPED] else ""
    judged = counts[Outcome.PASS] + counts[Outcome.FAIL]
    if report.verdict is Verdict.INCONCLUSIVE:
        return Text(
            f"INCONCLUSIVE: {counts[Outcome.INCONCLUSIVE]} gates cannot be decided on {pairs} pairs{skipped}.",
            style="yellow",
        )
    if report.verdict is Verdict.FAIL:
        return Text(
            f"FAIL: {counts[Outcome.FAIL]} of {judged} gates failed on {pairs} pairs{skipped}.", style="bold red"
        )
    return Text(f"PASS: all {judged} gates hold on {pairs} pairs{skipped}.", style="bold green")


def _metrics(report: Report) -> Table:
    table = Table(title="Artefact against reference", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for panel in report.panels:
        table.add_column(f"{panel.name}\n{panel.queries} queries\n{panel.pairs} pairs", justify="right")
    for metric, label in _LABELS.items():
        if any(metric in panel.metrics for panel in report.panels):
            table.add_row(label, *(_number(panel.metrics.get(metric)) for panel in report.panels))
    return table


def _worst(panel: PanelReport) -> Table:
    table = Table(title=f"Worst pairs of {panel.name}", title_justify="left", expand=True)
    columns: dict[str, Callable[[PairDelta], str]] = {
        "query": lambda pair: f"{pair.query_id}: {pair.query}",
        "document": lambda pair: f"{pair.document_id}: {pair.document}",
        "label": lambda pair: "" if pair.label is None else f"{pair.label:g}",
        "reference": lambda pair: f"{pair.reference:+.3f}",
        "artefact": lambda pair: f"{pair.artefact:+.3f}",
        "Δ": lambda pair: f"{pair.delta:+.3f}",
    }
    for name in columns:
        if name in ("query", "document"):
            table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1)  # these give way, the numbers do not
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for pair in panel.worst[:_WORST_SHOWN]:
        # Text, since a query may hold what rich would take for markup.
        table.add_row(*(Text(cell(pair)) for cell in columns.values()))
    return table


def _gates(report: Report) -> Table:
    table = Table(title=f"Gates of {report.recipe}", title_justify="left")
    for column in ("gate", "panel", "bound", "outcome", "because"):
        table.add_column(column)
    for gate in report.gates:
        bound = " ".join(f"{sign} {value:g}" for sign, value in (("≥", gate.min), ("≤", gate.max)) if value is not None)
        table.add_row(gate.metric, gate.panel, bound, Text(gate.outcome.value, style=_STYLE[gate.outcome]), gate.reason)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
