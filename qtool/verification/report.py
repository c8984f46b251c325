"""The result of a verification, for programs.

Rule: the report is complete by itself: what was compared, on what, with which numbers, and what follows from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from qtool.verification.gate import GateResult, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class PairDelta:
    """One pair's two scores and artefact minus reference; `query` and `document` are excerpts for people."""

    query_id: str
    document_id: str
    query: str
    document: str
    label: float | None
    reference: float
    artefact: float
    delta: float


@dataclass(frozen=True)
class PanelReport:
    """The metrics of one panel, and its worst pairs, worst first."""

    name: str
    sha256: str
    license: str
    modality: str
    queries: int
    pairs: int
    metrics: Mapping[str, float]
    worst: tuple[PairDelta, ...]


@dataclass(frozen=True)
class Report:
    """A whole verification."""

    artefact: str
    reference: str
    task: str
    task_source: str
    dtype: str
    recipe: str
    panels: tuple[PanelReport, ...]
    gates: tuple[GateResult, ...]
    verdict: Verdict
    seconds: float
    versions: Mapping[str, str | None]
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return self.verdict is not Verdict.FAIL

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON objects, `schema_version` first."""
        return {"schema_version": self.schema_version, **asdict(self)}

    def to_json(self) -> str:
        """The report as one JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def __rich__(self) -> RenderableType:
        from qtool.verification.table import render

        return render(self)
