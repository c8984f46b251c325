"""The report as Markdown for job summaries, pull requests and model cards; text of artefacts and panels is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from qtool.checks.findings import printable
from qtool.progress import duration
from qtool.reporting.words import (
    APART,
    INTERVALS,
    METRIC_COLUMNS,
    STAGE_COLUMNS,
    WEIGHTS,
    MetricRow,
    answers,
    compared,
    concerns,
    gates_title,
    has_centred,
    headline,
    interval,
    metric_rows,
    noise_floor,
    number,
    settings,
    short_name,
    signed,
    size,
    sizes,
    started,
    verdict_title,
)
from qtool.verify.report import PairDelta, PanelReport, Report, Side

_MARKS: Final = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "skipped": "⏭️", "ungated": "⚪"}
_WORST_SHOWN: Final = 5
_WEIGHTS_SHOWN: Final = 10
_LONGEST: Final = 1000


def render_markdown(report: Report) -> str:
    """The whole document."""
    blocks = [*_head(report), *_stages(report), *_metrics(report)]
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
        f"# {_MARKS.get(verdict, '')} {verdict_title(report, upper=True)}: {escaped(short_name(report.artefact))}",
        escaped(headline(report)),
        escaped(compared(report)),
        *([f"Weights: {sizes(report)}."] if sizes(report) else []),
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


def _metrics(report: Report) -> list[str]:
    blocks = [block for panel in report.panels for block in _panel(report, panel)]
    if not blocks:
        return []
    note = INTERVALS if any(panel.intervals for panel in report.panels) else ""
    noise = escaped(noise_floor(report.noise)) if report.noise else ""
    apart = escaped(APART) if has_centred(report) else ""
    return [f"## {escaped(gates_title(report))}", *blocks, *filter(None, (note, apart, noise))]


def _panel(report: Report, panel: PanelReport) -> list[str]:
    """The panel's metrics, those with a gate first; vectors of fewer dimensions are folded away."""
    rows = metric_rows(report, panel)
    shown, folded = (
        [row for row in rows if (row.is_gated or not row.is_shortened) is wanted] for wanted in (True, False)
    )
    columns = (*METRIC_COLUMNS, "reason")
    table = _table(columns, map(_metric, shown))
    summary = f"<details><summary>{len(folded)} metrics of shortened vectors</summary>"
    more = [summary, _table(METRIC_COLUMNS, (_metric(row)[:-1] for row in folded)), "</details>"] if folded else []
    return [f"### {escaped(panel.name)}: {', '.join(size(panel))}", table, *more]


def _metric(row: MetricRow) -> tuple[str, ...]:
    outcome = _marked(row.outcome) if row.is_gated else ""
    return (code(row.name), number(row.value), interval(row.ends), row.bound, outcome, escaped(row.reason))


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
    run = [
        *([f"Started {escaped(started(report))}."] if report.started else []),
        *([f"Command: {code(report.command)}"] if report.command else []),
        *([f"Answers: {escaped('; '.join(answers(report)))}."] if report.answers else []),
    ]
    return [
        *_section("Rederived files", _table(("file", "bytes", "sha256", "rederived sha256"), files)),
        *_section("Provenance", _table(("", "name", "engine", "numbers", "weights", "prompt"), sides)),
        *([_table(("panel", "license", "sha256"), panels)] if panels else []),
        *run,
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
