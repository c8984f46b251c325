"""The report of a verification, complete by itself: what was compared, on what, with which numbers, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from typing_extensions import override

from qtool.checks.stage import RederivedFile, Stage, TensorError
from qtool.escaping import json_escaped
from qtool.jsonfile import JsonError, json_value
from qtool.redaction import redacted
from qtool.results import Result, counted
from qtool.verify.gates import GateResult, Verdict
from qtool.verify.made import Made
from qtool.verify.metrics import Interval

SCHEMA_VERSION: Final = 3
_OLDER: Final = 2
"""Called the name of a tensor `hf_name`, in GGUF files too."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models: its name as the user gave it, and what its scores depend on (`sha256` is None for a server).

    `revision` is the commit of a repository on the Hub.
    `nbytes` are those of its tensors, projector included; None for a server and for what cannot be read. `parameters`
    is the number of the reference's weights, a head that repeats the embedding counted once; None for the artefact.
    """

    name: str
    engine: str
    numbers: str
    sha256: str | None
    prompt_sha256: str
    revision: str | None = None
    nbytes: int | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerCount:
    """How many questions a role answered in this run, and for how many the cache or an earlier run had the answer."""

    role: str
    asked: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """The reference in bf16 against itself in float32, over `pairs` pairs: |Δ| of log-odds or similarities."""

    dtype: str
    pairs: int
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class PairDelta:
    """One pair's two scores and artefact minus reference.

    `query` and `document` are excerpts for people, `pictures` small copies of both sides' pictures as data: URLs.
    """

    query_id: str
    document_id: str
    query: str
    document: str
    label: float | None
    modality: str
    reference: float
    artefact: float
    delta: float
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PanelReport:
    """The metrics of one panel, with intervals where resampling queries gives one, and its worst pairs, worst first.

    `scores` are (reference, artefact) of every pair, query by query; `by_modality` repeats the distances for text, image,
    video and mixed pairs. With these, `qtool compare` pairs the queries of several reports: `documents` is the number of
    each query's pairs, `labels` the label of each pair (nothing where none has one), and `vector_errors` has for each
    query, of the items that no query before it has, the sums of |Δ|², of |Δ minus the panel's mean Δ|², and of 1, where
    Δ is the difference of an item's two vectors (nothing for a reranker).
    """

    name: str
    sha256: str
    license: str
    modality: str
    queries: int
    pairs: int
    metrics: Mapping[str, float]
    worst: tuple[PairDelta, ...]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    by_modality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scores: tuple[tuple[float, float], ...] = ()
    documents: tuple[int, ...] = ()
    labels: tuple[float | None, ...] = ()
    vector_errors: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Result):
    """A whole verification; `settings` are those that its other shards must share, and which shard this is.

    `started` is a time in UTC (ISO 8601), `command` what was typed, without secrets; both are empty where nobody knows.
    `made` is how the artefact was made, as far as it says.
    """

    artefact: Side
    reference: Side
    task: str
    task_source: str
    recipe: str
    settings: Mapping[str, Any]
    stages: tuple[Stage, ...]
    panels: tuple[PanelReport, ...]
    gates: tuple[GateResult, ...]
    verdict: Verdict
    seconds: float
    versions: Mapping[str, str | None]
    noise: NoiseFloor | None = None
    weights: tuple[TensorError, ...] = ()
    rederived: tuple[RederivedFile, ...] = ()
    started: str = ""
    command: str = ""
    answers: tuple[AnswerCount, ...] = ()
    made: Made | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """Whether no stage and no gate failed."""
        return self.verdict is not Verdict.FAIL

    @property
    @override
    def headline(self) -> str:
        pairs = sum(panel.pairs for panel in self.panels)
        scored = f"{counted(pairs, 'pair')} scored" if pairs else "nothing scored"
        return f"{self.verdict.value.upper()}: {self.artefact.name} against {self.reference.name}, {scored}."

    @override
    def records(self) -> list[dict[str, Any]]:
        gates = {(gate.panel, gate.metric): gate for gate in self.gates}
        found = []
        for panel in self.panels:
            for metric, value in panel.metrics.items():
                ends, gate = panel.intervals.get(metric), gates.get((panel.name, metric))
                found.append(
                    {
                        "panel": panel.name,
                        "metric": metric,
                        "value": value,
                        "low": ends.low if ends else None,
                        "high": ends.high if ends else None,
                        "min": gate.min if gate else None,
                        "max": gate.max if gate else None,
                        "outcome": gate.outcome.value if gate else None,
                    }
                )
        return found

    @override
    def to_dict(self) -> dict[str, Any]:
        return redacted({"schema_version": self.schema_version, **asdict(self)})

    def to_json(self) -> str:
        """The report as one JSON document."""
        return json_escaped(json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a report says of the run itself: when, how and with what it ran, and how large both models are."""

    seconds: float
    versions: Mapping[str, str | None]
    started: str = ""
    command: str = ""
    artefact_bytes: int | None = None
    reference_bytes: int | None = None
    parameters: int | None = None
    made: Made | None = None


def parse_report(content: bytes) -> Report:
    """The report in a `report.json` of this schema version or of 2. Raises ValueError whose text is what is wrong."""
    from pydantic import TypeAdapter, ValidationError

    try:
        data = json_value(content)
    except JsonError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in (_OLDER, SCHEMA_VERSION):
        raise ValueError(f"its schema version is {version}, expected {_OLDER} or {SCHEMA_VERSION}")
    try:
        return TypeAdapter(Report).validate_python(_upgraded(data) if version == _OLDER else data)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    weights = data.get("weights")
    if isinstance(weights, list):  # anything else is left to validation
        weights = [{**each, "tensor": each.get("hf_name")} if isinstance(each, dict) else each for each in weights]
    return {**data, "schema_version": SCHEMA_VERSION, "weights": weights}
