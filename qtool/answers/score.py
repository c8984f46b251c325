"""`qtool score`: what a runtime answers to each pair of a panel.

Rule: one line a pair, in the panel's order, whatever order the answers came in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from qtool.answers.outputs import check_output, replacing, resumable
from qtool.answers.panel import PanelChoice
from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.progress import StageProgress
from qtool.scoring.probability import sigmoid
from qtool.scoring.runtime import RuntimeOptions, open_runtime

_BEGINNING: Final = b'{"query_id": '


@dataclass(frozen=True)
class ScoreOptions:
    """Whom to ask what. With an `output`, an interrupted run is gone on with; `force` replaces it and begins anew."""

    target: str
    panel: PanelChoice
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    output: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class ScoredPair:
    """A pair's log-odds before the sigmoid, and after it the probability of "yes"."""

    query_id: str
    document_id: str
    log_odds: float
    probability: float

    @property
    def line(self) -> str:
        """As it stands in the output."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class Scores:
    """The scored pairs in the panel's order, and who was asked what."""

    pairs: tuple[ScoredPair, ...]
    panel: str
    panel_sha256: str
    identity: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it, for a program."""
        return {"schema_version": 1, **asdict(self)}


def score(options: ScoreOptions, progress: StageProgress | None = None) -> Scores:
    """Score a panel. Raises UsageError for an embedder; what was answered before any error is kept for the next run."""
    if options.output is not None:
        check_output(options.output, _BEGINNING, force=options.force)
    panel = options.panel.load()
    scorer = open_runtime(options.target, options.runtime)
    if scorer.task is not Task.RERANK:
        raise UsageError(f"{options.target} is an embedder: it gives vectors and no scores.", "Use qtool embed.")
    pairs, shown = panel.pairs, Counter("scoring", len(panel.pairs), progress)
    with resumable(scorer, options.output, force=options.force) as asked:
        answers = zip(pairs, asked.score(pairs, shown), strict=True)
        scored = tuple(ScoredPair(p.query.id, p.document.id, value, sigmoid(value)) for p, value in answers)
        if options.output is not None:
            with replacing(options.output) as file:
                file.write_text("".join(f"{pair.line}\n" for pair in scored))
    return Scores(scored, panel.name, panel.sha256, asdict(scorer.identity))


class Counter:
    """Counts answers for whoever shows progress."""

    def __init__(self, stage: str, total: int, progress: StageProgress | None) -> None:
        self._stage = stage
        self._total = total
        self._progress = progress
        self._done = 0
        self._show()

    def __call__(self, _place: int, _answer: object) -> None:
        """One more is known."""
        self._done += 1
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)
