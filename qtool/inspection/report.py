"""The result of an inspection, for programs.

Rule: what was looked at, what it is, what follows; nothing in it depends on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from qtool.inspection.classes import TensorClass
from qtool.inspection.finding import Finding, Severity, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION: Final = 1
_LONGEST_MARKER: Final = 1000


@dataclass(frozen=True)
class Artefact:
    """One model or one projector. `markers` are the facts by which engines decide what to do with it, for people."""

    name: str
    kind: str
    family: str
    architecture: str
    task: str
    task_source: str
    format: str
    classes: tuple[TensorClass, ...]
    markers: Mapping[str, str]
    findings: tuple[Finding, ...]

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

    def to_json(self) -> dict[str, Any]:
        """The artefact as a JSON object."""
        return {
            "name": self.name, "kind": self.kind, "family": self.family, "architecture": self.architecture,
            "task": self.task, "task_source": self.task_source, "format": self.format, "weights": self.weights,
            "bytes": self.nbytes, "bits_per_weight": round(self.bits_per_weight, 4),
            "classes": [each.to_json() for each in self.classes], "markers": dict(self.markers),
            "findings": [{**asdict(each), "severity": each.severity.value} for each in self.findings],
        }  # fmt: skip


def shown(artefact: Artefact) -> Artefact:
    """The artefact with all that its file says of itself made fit for a terminal."""
    markers = {name: printable(value, _LONGEST_MARKER) for name, value in artefact.markers.items()}
    name, kind, architecture = map(printable, (artefact.name, artefact.kind, artefact.architecture))
    return replace(artefact, name=name, kind=kind, architecture=architecture, markers=markers)


@dataclass(frozen=True)
class InspectionReport:
    """Everything found at `target`; `revision` and `fetched_bytes` are those of a repository on the hub."""

    target: str
    revision: str | None
    fetched_bytes: int
    artefacts: tuple[Artefact, ...]

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
        """Whether nothing says what some artefact is for, so that not all could be looked at."""
        return any(each.code.endswith("-task-undeclared") for each in self.findings)

    def to_json(self) -> Mapping[str, Any]:
        """The report as `--json` prints it."""
        return {
            "schema_version": SCHEMA_VERSION, "target": self.target, "revision": self.revision,
            "fetched_bytes": self.fetched_bytes, "broken": self.broken,
            "artefacts": [artefact.to_json() for artefact in self.artefacts],
        }  # fmt: skip

    def __rich__(self) -> RenderableType:
        from qtool.inspection.present import render

        return render(self)
