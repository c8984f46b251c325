"""The report as Markdown for job summaries, pull requests and model cards; text of artefacts and panels is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from qtool.checks.findings import printable
from qtool.reporting.words import (
    GATE_COLUMNS,
    INTERVALS,
    STAGE_COLUMNS,
    WEIGHTS,
    bound,
    compared,
    concerns,
    duration,
    gates_title,
    headline,
    interval,
    metric_names,
    noise_floor,
    number,
    settings,
    short_name,
    signed,
    size,
)
from qtool.verify.metrics import label
from qtool.verify.report import PairDelta, PanelReport, Report, Side

_MARKS: Final = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "skipped": "⏭️", "ungated": "⚪"}
_WORST_SHOWN: Final = 5
_WEIGHTS_SHOWN: Final = 10
_LONGEST: Final = 1000


def render_markdown(report: Report) -> str:
    """The whole document."""
    blocks = [*_head(report), *_stages(report), *_gates(report), *_metrics(report)]
    blocks += [block for panel in report.panels for block in _worst(panel)]
    return "\n\n".join([*blocks, *_weights(report), *_provenance(report)]) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows literally, in a table too."""
    quoted = re.sub(r"([\\`*_\[\]~#$])", r"\\\1", printable(text, _LONGEST))
    return quoted.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def code(text: str) -> str:
    """Text as code, without the characters that would end the code or a table's cell."""
    return f"`{re.sub(r'[`|<>]', '', printable(text, _LONGEST))}`"


def _head(report: Report) -> list[str]:
    verdict = report.verdict.value
    reasons = [
        f"- {_marked(each.outcome)}: {escaped(each.about)}: {escaped(each.sentence)}" for each in concerns(report)
    ]
    return [
        f"# {_MARKS.get(verdict, '')} {verdict.upper()}: {escaped(short_name(report.artefact))}",
        escaped(headline(report)),
        escaped(compared(report)),
        *(["\n".join(reasons)] if reasons else []),
    ]


def _stages(report: Report) -> list[str]:
    rows = [
        (escaped(stage.name), _marked(stage.outcome.value), escaped(stage.summary), duration(stage.seconds))
        for stage in report.stages
    ]
    findings = [
        f"- {code(each.code)} ({each.severity.value}): {escaped(each.sentence)} {escaped(each.remedy)}".rstrip()
        for stage in report.stages
        for each in stage.findings
    ]
    return _section("Stages", _table(STAGE_COLUMNS, rows), "\n".join(findings))


def _gates(report: Report) -> list[str]:
    rows = [
        (
            escaped(label(gate.metric)),
            escaped(gate.panel),
            bound(gate),
            _marked(gate.outcome.value),
            escaped(gate.reason),
        )
        for gate in report.gates
    ]
    return _section(escaped(gates_title(report)), _table(GATE_COLUMNS, rows))


def _metrics(report: Report) -> list[str]:
    columns = [f"{escaped(panel.name)}<br>{', '.join(size(panel))}" for panel in report.panels]
    rows = [(escaped(label(name)), *(_value(panel, name) for panel in report.panels)) for name in metric_names(report)]
    note = f"In parentheses: {INTERVALS}." if any(panel.intervals for panel in report.panels) else ""
    noise = escaped(noise_floor(report.noise)) if report.noise else ""
    return _section("Metrics", _table(("metric", *columns), rows, right=True), note, noise)


def _value(panel: PanelReport, metric: str) -> str:
    ends = panel.intervals.get(metric)
    return number(panel.metrics.get(metric)) + (f" ({interval(ends)})" if ends else "")


def _worst(panel: PanelReport) -> list[str]:
    rows = [_pair(pair) for pair in panel.worst[:_WORST_SHOWN]]
    return _section(
        f"Worst pairs of {escaped(panel.name)}",
        _table(("query", "document", "label", "reference", "artefact", "Δ"), rows),
    )


def _pair(pair: PairDelta) -> tuple[str, ...]:
    texts = (f"{pair.query_id}: {pair.query}", f"{pair.document_id}: {pair.document}")
    scores = (signed(pair.reference), signed(pair.artefact), signed(pair.delta))
    return (*map(escaped, texts), "" if pair.label is None else f"{pair.label:g}", *scores)


def _weights(report: Report) -> list[str]:
    worst = sorted(report.weights, key=lambda each: -each.relative_error)
    rows = [
        (escaped(each.tensor), escaped(each.format), number(each.relative_error), number(each.bound))
        for each in worst[:_WEIGHTS_SHOWN]
    ]
    more = f"{len(worst) - len(rows)} more in report.json." if len(worst) > len(rows) else ""
    return _section("Weights", _table(("tensor", "format", "relative error", "allowed"), rows), WEIGHTS, more)


def _provenance(report: Report) -> list[str]:
    files = [
        (
            escaped(each.name),
            "equal" if each.is_equal else "differs",
            code(each.sha256),
            code(each.rederived_sha256 or "none"),
        )
        for each in report.rederived
    ]
    sides = [_side("artefact", report.artefact), _side("reference", report.reference)]
    panels = [(escaped(panel.name), escaped(panel.license), code(panel.sha256)) for panel in report.panels]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
    return [
        *_section("Rederived files", _table(("file", "bytes", "sha256", "rederived sha256"), files)),
        *_section("Provenance", _table(("", "name", "engine", "numbers", "weights", "prompt"), sides)),
        *([_table(("panel", "license", "sha256"), panels)] if panels else []),
        escaped(
            f"Recipe {report.recipe or 'none'}; task from {report.task_source}; {settings(report)}; {versions}; {duration(report.seconds)}."
        ),
    ]


def _side(role: str, side: Side) -> tuple[str, ...]:
    hashes = (
        code(side.sha256) if side.sha256 else "not known",
        code(side.prompt_sha256) if side.prompt_sha256 else "not known",
    )
    name = f"{side.name} at {side.revision}" if side.revision else side.name
    return (role, escaped(name), escaped(side.engine), escaped(side.numbers), *hashes)


def _marked(outcome: str) -> str:
    return f"{_MARKS.get(outcome, '')} {outcome}".lstrip()


def _section(title: str, table: str, *more: str) -> list[str]:
    return [f"## {title}", table, *filter(None, more)] if table else []


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    lines = [" | ".join(row) for row in rows]
    rule = " | ".join(["---", *(["---:" if right else "---"] * (len(columns) - 1))])
    return "\n".join(f"| {line} |" for line in (" | ".join(columns), rule, *lines)) if lines else ""
