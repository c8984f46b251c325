"""The inspection as a person reads it in a terminal.

Rule: what it is first, the verdict last; a finding stands with its code and the command that mends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qtool.console import human_size, unwrapped
from qtool.inspection.finding import Finding, Severity

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtool.inspection.classes import TensorClass
    from qtool.inspection.report import Artefact, InspectionReport

_PLURAL: Final = {Severity.BROKEN: "broken", Severity.WARNING: "warnings", Severity.NOTE: "notes"}
_STYLE: Final = {Severity.BROKEN: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def render(report: InspectionReport) -> RenderableType:
    """Each artefact with its classes, markers and findings; then the verdict."""
    parts: list[RenderableType] = []
    for artefact in report.artefacts:
        parts += [*_artefact(artefact), Text("")]
    if report.revision:
        parts.append(Text(f"revision {report.revision}, {human_size(report.fetched_bytes)} fetched", style="dim"))
    return Group(*parts, _verdict(report))


def _artefact(artefact: Artefact) -> Iterator[RenderableType]:
    yield Text(artefact.name, style="bold")
    task = f", task {artefact.task} ({artefact.task_source})" if artefact.task else ""
    yield Text(f"{artefact.kind}: {artefact.family}, {artefact.architecture}{task}")
    yield Text(
        f"{artefact.format}, {artefact.weights:,} weights in {human_size(artefact.nbytes)}, "
        f"{artefact.bits_per_weight:.2f} bits per weight"
    )
    yield _classes(artefact.classes)
    if artefact.markers:
        yield _markers(artefact)
    for finding in artefact.findings:
        yield from _finding(finding)


def _classes(classes: tuple[TensorClass, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensors of", no_wrap=True)
    table.add_column("types", overflow="fold")
    for heading in ("number", "size", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in classes:
        types = ", ".join(f"{name} {count}" if len(each.types) > 1 else name for name, count in each.types.items())
        table.add_row(
            each.name, Text(types), f"{each.tensors:,}", human_size(each.nbytes), f"{each.bits_per_weight:.2f}"
        )
    return table


def _markers(artefact: Artefact) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in artefact.markers.items():
        table.add_row(name, Text(value))  # as Text, so that what a file says is not taken for markup
    return table


def _finding(finding: Finding) -> Iterator[Text]:
    yield Text.assemble((f"{finding.severity.value} ", _STYLE[finding.severity]), f"{finding.code}: {finding.sentence}")
    if finding.remedy:
        yield unwrapped(f"    {finding.remedy}", "dim")


def _verdict(report: InspectionReport) -> Text:
    counts = Counter(sorted((each.severity for each in report.findings), key=list(Severity).index))
    found = [f"{count} {_PLURAL[severity] if count > 1 else severity.value}" for severity, count in counts.items()]
    if report.broken:
        return Text(f"BROKEN: {', '.join(found)}.", style="bold red")
    if report.undecided:
        missing = "nothing tells what it is for, so not all was looked at; pass --task rerank or --task embed"
        return Text(f"UNDECIDED, with {', '.join(found)}: {missing}.", style="bold yellow")
    return Text(f"OK, with {', '.join(found)}." if found else "OK: nothing to complain about.", style="bold green")
