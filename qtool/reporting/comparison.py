"""The public `compare`: reads reports, puts their artefacts side by side, and shows it in a terminal and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from qtool.checks.findings import printable
from qtool.errors import ModelError, UsageError
from qtool.escaping import json_escaped, reportable
from qtool.jsonfile import read_json
from qtool.redaction import redacted
from qtool.reporting.html import render_comparison
from qtool.reporting.words import (
    APART,
    KEY_METRICS,
    LABEL,
    PAIRED,
    change,
    counted,
    interval,
    labels,
    made,
    number,
    weight,
)
from qtool.reporting.write import write_whole
from qtool.verify.case import REPORT
from qtool.verify.merge import read_report
from qtool.verify.paired import ComparedMetric, ComparedPanel, Comparison, compare_reports
from qtool.verify.report import Report, parse_report

COMPLETE, PAGE = "compare.json", "compare.html"
INDEX: Final = "reports.json"
"""Of the verification of several artefacts, with all their reports."""

_LONGEST: Final = 1000
_VALUE, _CHANGE, _ENDS, _RATIO = 8, 8, 18, 5
"""Widths: with a place's number and the word, a row has 80 columns."""
_STYLES: Final = {"better": "green", "worse": "bold red", "undecided": "dim", "equal": "dim"}


def compare(
    paths: Sequence[Path],
    *,
    baseline: Path | None = None,
    fail_if_worse: Sequence[str] = (),
    output: Path | None = None,
    force: bool = False,
    command: str = "",
) -> Comparison:
    """Put the artefacts of several reports of `verify` side by side.

    A path is the folder of a report, its report.json, or the folder of the verification of several artefacts; shards of
    one run are one artefact. `baseline` is one of them, or one more, by default the first. With `output`, a folder,
    compare.html and compare.json are written there, and `force` replaces them.
    """
    if output is not None:
        _check_output(output, force=force)
    if baseline is not None and baseline not in paths:
        paths = (baseline, *paths)
    found = {path: _reports(path) for path in dict.fromkeys(paths)}
    first = found[baseline][0][0] if baseline is not None else None
    reports = [each for several in found.values() for each in several]
    comparison = redacted(compare_reports(reports, first, fail_if_worse, command))
    if output is not None:
        write_comparison(comparison, output)
    return comparison


def _reports(path: Path) -> list[tuple[str, Report]]:
    """The reports at a path, each with where it was read."""
    index = path if path.name == INDEX else path / INDEX
    if not index.is_file() or (path / REPORT).is_file():
        return [(str(path), read_report(path, "Verify again, with --force."))]
    artefacts = read_json(index).get("artefacts")
    if not isinstance(artefacts, list):
        raise ModelError(f"{index} was not written by qtool verify: it has no list of artefacts.")
    read = []
    for each in artefacts:
        if isinstance(each, dict) and each.get("report") is not None:
            source = f"{index}, {each.get('artefact')}"
            try:
                read.append((source, parse_report(json.dumps(each["report"]).encode())))
            except ValueError as error:
                raise UsageError(
                    f"{source} is not a report that this version reads: {error}.", "Verify again, with --force."
                ) from error
    if not read:
        raise UsageError(f"{index} holds no report: no artefact could be judged.", "Verify the artefacts again.")
    return read


def _check_output(output: Path, *, force: bool) -> None:
    """Raise UsageError where the comparison would replace one without `force`, or what is none."""
    written = output / COMPLETE
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is not a folder.", "Choose another --output.")
    if not written.exists() and not (output / PAGE).exists():
        return
    if not force:
        raise UsageError(f"{output} holds a comparison.", "Choose another --output, or pass --force to replace it.")
    if written.exists() and not _is_ours(written):
        raise UsageError(
            f"{written} was not written by qtool compare, so --force does not replace it.", "Choose another --output."
        )


def remove_comparison(folder: Path) -> None:
    """Remove a comparison that lies in `folder`; it would be of another verification than what is written there."""
    if _is_ours(folder / COMPLETE):
        for name in (PAGE, COMPLETE):
            (folder / name).unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    try:
        return bool(read_json(path).keys() >= {"artefacts", "baseline", "panels"})
    except ModelError:
        return False


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write compare.html and compare.json into `folder`, which is made if need be. Raises SetupError."""
    content = json_escaped(json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    write_whole(folder, {PAGE: render_comparison(reportable(comparison)), COMPLETE: content + "\n"})


# For a terminal of 80 columns; no number is cut.


def render_console(comparison: Comparison, output: Path | None = None) -> RenderableType:
    """The artefacts, a block of metrics for each panel, warnings, and what was to be no worse."""
    parts: list[RenderableType] = [*_artefacts(comparison)]
    for panel in comparison.panels:
        parts += _panel(comparison, panel)
    parts += [Text(PAIRED, style="dim"), Text(""), Text(APART, style="dim")]
    parts += _warnings(comparison)
    if output is not None:
        parts.append(Text(f"Comparison: {output / PAGE}", no_wrap=True, overflow="ignore"))
    parts += [Text(printable(each, _LONGEST), style="bold red") for each in comparison.failures]
    if comparison.fail_if_worse and comparison.passed:
        parts.append(
            Text(f"PASS: none is worse for certain in {', '.join(comparison.fail_if_worse)}.", style="bold green")
        )
    return Group(*parts)


def render_beside(comparison: Comparison) -> RenderableType:
    """The blocks of the panels alone, after the reports of the artefacts themselves."""
    names = (_name(comparison, place) for place in range(len(comparison.artefacts)))
    blocks = [line for panel in comparison.panels for line in _panel(comparison, panel)]
    return Group(
        *(Text("\nSide by side", style="bold"), *names, Text(""), *blocks, Text(PAIRED, style="dim")),
        *_warnings(comparison),
    )


def _warnings(comparison: Comparison) -> Iterator[Text]:
    return (Text.assemble(("warning ", "yellow"), printable(each, _LONGEST)) for each in comparison.warnings)


def _artefacts(comparison: Comparison) -> Iterator[RenderableType]:
    yield Text("Artefacts", style="bold")
    for place, each in enumerate(comparison.artefacts):
        yield _name(comparison, place)
        facts = [made(each.made), weight(each.side.nbytes, each.bits_per_weight), f"verdict {each.verdict}"]
        yield Padding(Text(printable("; ".join(filter(None, facts)), _LONGEST)), (0, 0, 0, 6), expand=False)
    reference = comparison.reference
    size = f", {weight(reference.nbytes, None)}" if reference.nbytes else ""
    yield Text(f"  Reference: {printable(reference.name, _LONGEST)}{size}")
    yield Text("")


def _name(comparison: Comparison, place: int) -> Text:
    baseline = ", the baseline" if place == comparison.baseline else ""
    return Text(f"  {place + 1} {printable(comparison.artefacts[place].side.name, _LONGEST)}{baseline}")


def _panel(comparison: Comparison, panel: ComparedPanel) -> Iterator[RenderableType]:
    size = f"{counted(panel.queries, 'query')}, {counted(panel.pairs, 'pair')}"
    yield Text.assemble((printable(panel.name), "bold"), f": {size}")
    wanted = (*KEY_METRICS[comparison.task], *comparison.fail_if_worse)
    rows = [row for row in panel.metrics if row.metric in wanted]
    for row in rows:
        yield Text(f"  {row.metric}")
        yield from (_row(row, place, name) for place, name in enumerate(labels(comparison)))
    if hidden := len(panel.metrics) - len(rows):
        yield Text(f"  {hidden} more metrics are in compare.json and compare.html (-o)", style="dim")
    yield Text("")


def _row(row: ComparedMetric, place: int, name: str) -> Text:
    line = Text(no_wrap=True, overflow="ignore")
    line.append(f"    {printable(name):<{LABEL}} {number(row.values[place]):>{_VALUE}}")
    if (difference := row.differences[place]) is not None:
        ratio = "" if difference.ratio is None else f"x{difference.ratio:.2f}"
        line.append(
            f" {change(difference.value):>{_CHANGE}} {interval(difference.interval):<{_ENDS}} {ratio:>{_RATIO}} "
        )
        line.append(difference.outcome, style=_STYLES.get(difference.outcome, ""))
    line.rstrip()
    return line
