"""The result of an inspection, for programs and for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from qtool.arch.gguf_names import TENSOR_CLASSES
from qtool.checks.findings import Finding, Severity, printable
from qtool.console import human_size, unwrapped
from qtool.results import Result

if TYPE_CHECKING:
    from rich.console import RenderableType

# Tensors by what they are for, with types, sizes and bits per weight. Both formats are classed by llama.cpp's names,
# so that their tables can be compared.


@dataclass(frozen=True)
class ClassedTensor:
    """One tensor as its file stores it; scales have `type` None and no weights of their own."""

    gguf_name: str
    type: str | None
    weights: int
    nbytes: int


@dataclass(frozen=True)
class TensorClass:
    """All tensors of one purpose; `types` counts them by type, scales left out."""

    name: str
    tensors: int
    types: Mapping[str, int]
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The class as a JSON object."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "types": dict(self.types),
            "weights": self.weights,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
        }


def tensor_classes(tensors: Iterable[ClassedTensor]) -> tuple[TensorClass, ...]:
    """`tensors` by class, empty classes left out."""
    members: dict[str, list[ClassedTensor]] = {name: [] for name in TENSOR_CLASSES}
    for tensor in tensors:
        purpose = next(name for name, pattern in TENSOR_CLASSES.items() if re.fullmatch(pattern, tensor.gguf_name))
        members[purpose].append(tensor)
    return tuple(_tensor_class(name, found) for name, found in members.items() if found)


def _tensor_class(name: str, members: list[ClassedTensor]) -> TensorClass:
    types = Counter(member.type for member in members if member.type is not None)
    return TensorClass(
        name,
        sum(types.values()),
        dict(types.most_common()),
        sum(member.weights for member in members),
        sum(member.nbytes for member in members),
    )


# The result of an inspection, for programs; nothing in it depends on the machine.

SCHEMA_VERSION: Final = 1
_LONGEST_MARKER: Final = 1000


@dataclass(frozen=True, kw_only=True)
class InspectedArtefact:
    """One model or one projector, which has no task.

    `markers` are the facts by which engines decide what to do with it, for people.
    """

    name: str
    kind: str
    family: str
    architecture: str
    format: str
    classes: tuple[TensorClass, ...]
    findings: tuple[Finding, ...]
    task: str = ""
    task_source: str = ""
    markers: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.classes)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(each.weights for each in self.classes)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The artefact as a JSON object."""
        return {
            "name": self.name,
            "kind": self.kind,
            "family": self.family,
            "architecture": self.architecture,
            "task": self.task,
            "task_source": self.task_source,
            "format": self.format,
            "weights": self.weights,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "classes": [each.to_dict() for each in self.classes],
            "markers": dict(self.markers),
            "findings": [{**asdict(each), "severity": each.severity.value} for each in self.findings],
        }


def shown(artefact: InspectedArtefact) -> InspectedArtefact:
    """The artefact with all that its file says of itself made fit for a terminal."""
    markers = {name: printable(value, _LONGEST_MARKER) for name, value in artefact.markers.items()}
    name, kind, architecture = map(printable, (artefact.name, artefact.kind, artefact.architecture))
    return replace(artefact, name=name, kind=kind, architecture=architecture, markers=markers)


@dataclass(frozen=True, repr=False)
class InspectionReport(Result):
    """Everything found at `target`; `revision` and `fetched_bytes` are those of a repository on the hub."""

    target: str
    revision: str | None
    fetched_bytes: int
    artefacts: tuple[InspectedArtefact, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all artefacts."""
        return tuple(each for artefact in self.artefacts for each in artefact.findings)

    @property
    def broken(self) -> bool:
        """Whether anything found breaks what it was found in."""
        return any(each.severity is Severity.BROKEN for each in self.findings)

    @property
    def undecided(self) -> bool:
        """Whether some artefact does not declare its task, so that not everything could be checked."""
        return any(each.code.endswith("-task-undeclared") for each in self.findings)

    @property
    @override
    def headline(self) -> str:
        return f"{self.target}: {_verdict(self)}"

    @override
    def records(self) -> list[dict[str, Any]]:
        return [
            {"artefact": artefact.name, **asdict(finding), "severity": finding.severity.value}
            for artefact in self.artefacts
            for finding in artefact.findings
        ]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "revision": self.revision,
            "fetched_bytes": self.fetched_bytes,
            "broken": self.broken,
            "undecided": self.undecided,
            "artefacts": [artefact.to_dict() for artefact in self.artefacts],
        }

    def __rich__(self) -> RenderableType:
        return render_inspection(self)


# The inspection as a person reads it in a terminal: what it is first, the verdict last; each finding with its code and
# the command that repairs it.

_PLURAL: Final = {Severity.BROKEN: "broken", Severity.WARNING: "warnings", Severity.NOTE: "notes"}
_STYLE: Final = {Severity.BROKEN: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def render_inspection(report: InspectionReport) -> RenderableType:
    """Each artefact with its classes, markers and findings; then the verdict."""
    parts: list[RenderableType] = []
    for artefact in report.artefacts:
        parts += [*_artefact(artefact), Text("")]
    if report.revision:
        parts.append(Text(f"revision {report.revision}, {human_size(report.fetched_bytes)} fetched", style="dim"))
    return Group(*parts, _verdict(report))


def _artefact(artefact: InspectedArtefact) -> Iterator[RenderableType]:
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


def _markers(artefact: InspectedArtefact) -> Table:
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
        missing = "the task is not declared, so not everything was checked; pass --task rerank or --task embed"
        return Text(f"UNDECIDED, with {', '.join(found)}: {missing}.", style="bold yellow")
    return Text(f"OK, with {', '.join(found)}." if found else "OK: no problems found.", style="bold green")
