"""Asks the models: the reference, the reference in bf16, the artefact."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.inputs.items import Item
from qtool.inputs.panels import Panel
from qtool.progress import StageProgress, ignore
from qtool.scoring.ledger import open_ledger
from qtool.scoring.remembering import Remembering, open_cache
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.scorer import Answered, Identity, Scorer, query_content
from qtool.verify.case import ANSWERS, Case, artefact_runtime
from qtool.verify.metrics import Scores
from qtool.verify.report import Side

# One model's answers to a panel. Each distinct content is asked once, and in the panel's order, so that two models'
# answers compare place by place.


Places = Sequence[tuple[int, int]]
"""For each pair the places of its query's and its document's vector."""


@dataclass(frozen=True)
class Answers:
    """Scores [pairs]; of an embedder these are cosines, and its vectors [items, dim] of the distinct items come along."""

    scores: Scores
    vectors: Scores | None = None
    places: Places = ()

    @classmethod
    def of_vectors(cls, vectors: Scores, places: Places) -> Answers:
        """An embedder's answers."""
        queries, documents = (vectors[list(side)] for side in zip(*places, strict=True))
        return cls(np.einsum("nd,nd->n", queries, documents), vectors, places)

    def shortened(self, dimensions: int) -> Answers:
        """What the vectors say when cut to their first `dimensions` and normalised again (MRL)."""
        if self.vectors is None or not 0 < dimensions <= self.vectors.shape[1]:
            raise UsageError(f"There are no vectors of {dimensions} dimensions here.")
        cut = self.vectors[:, :dimensions]
        return self.of_vectors(cut / np.linalg.norm(cut, axis=1, keepdims=True), self.places)


def work(panel: Panel, task: Task, query_instruction: str | None) -> int:
    """How many pairs or distinct items a scorer has to answer."""
    return len(panel.pairs) if task is Task.RERANK else len(_distinct(panel, query_instruction)[0])


def answer(
    panel: Panel, scorer: Scorer, task: Task, query_instruction: str | None = None, answered: Answered = ignore
) -> Answers:
    """Score or embed everything in the panel; an embedder's queries get `query_instruction` where the panel gives none."""
    if not panel.queries:
        return Answers(np.zeros(0))
    if task is Task.RERANK:
        return Answers(np.asarray(scorer.score(panel.pairs, answered), dtype=np.float64))
    items, places = _distinct(panel, query_instruction)
    return Answers.of_vectors(scorer.embed(items, answered).astype(np.float64), places)


def by_query(panel: Panel, scores: Scores) -> list[Scores]:
    """The scores of each query's documents."""
    return np.split(scores, np.cumsum([len(query.documents) for query in panel.queries])[:-1])


def _distinct(panel: Panel, query_instruction: str | None) -> tuple[list[Item], Places]:
    places: dict[Hashable, int] = {}
    items: list[Item] = []

    def place(item: Item) -> int:
        content = query_content(item)
        if content not in places:
            places[content] = len(items)
            items.append(item)
        return places[content]

    return items, [
        (place(query.item.with_instruction(query.item.instruction or query_instruction)), place(document))
        for query in panel.queries
        for document in query.documents
    ]


# Asking the models: the reference, the reference in bf16, the artefact. One model is in memory at a time, and every
# answer is on the disk before the next question is asked of anyone.


NOISE_DTYPE: Final = "bfloat16"


class Role(str, Enum):
    """Who answers; also the name of the file of answers."""

    REFERENCE = "reference"
    NOISE = "noise"
    ARTEFACT = "artefact"


@dataclass(frozen=True)
class RoleScores:
    """What one role answered to each panel, what its answers depend on, and how long it took, loading included."""

    side: Side
    answers: tuple[Answers, ...]
    seconds: float = 0.0


def open_role(case: Case, role: Role) -> Scorer:
    """The runtime behind a role; no weight is read yet."""
    options = case.options
    if role is Role.ARTEFACT:
        target = options.artefact if case.artefact is None else str(case.artefact)
        return open_runtime(target, artefact_runtime(options, case.artefact, case.task, case.family))
    dtype = NOISE_DTYPE if role is Role.NOISE else options.dtype
    return open_runtime(str(case.reference), RuntimeOptions(case.task, dtype, options.device))


def collect_scores(case: Case, role: Role, panels: Sequence[Panel], progress: StageProgress) -> RoleScores:
    """Ask a role everything in `panels`, except what it has answered before."""
    started = time.monotonic()
    with closing(_remembering(case, role, open_role(case, role))) as scorer:
        counter = _Counter(role.value, panels, case, progress)
        answers = tuple(answer(panel, scorer, case.task, case.query_instruction, counter) for panel in panels)
        return RoleScores(_side(case, role, scorer.identity), answers, time.monotonic() - started)


def _side(case: Case, role: Role, identity: Identity) -> Side:
    """How the report names a role."""
    name = case.options.artefact if role is Role.ARTEFACT else case.options.reference
    sha256 = identity.model if identity.is_pinned else None
    return Side(name, identity.engine, identity.numbers, sha256, identity.prompt)


def answer_file(folder: Path, role: Role) -> Path:
    """Where a verification keeps the answers of a role."""
    return folder / ANSWERS / f"{role.value}.jsonl"


def _remembering(case: Case, role: Role, scorer: Scorer) -> Scorer:
    stores = []
    if case.options.use_cache and (cache := open_cache(scorer.identity)) is not None:
        stores.append(cache)
    if case.options.output is not None:
        stores.append(open_ledger(answer_file(case.options.output, role), scorer.identity))
    return Remembering(scorer, stores) if stores else scorer


class _Counter:
    """Adds up what a scorer answers, since it counts from zero on each panel."""

    def __init__(self, role: str, panels: Sequence[Panel], case: Case, progress: StageProgress) -> None:
        self._role, self._progress = role, progress
        self._total = sum(work(panel, case.task, case.query_instruction) for panel in panels)
        self._done = 0
        self._progress(self._role, 0, self._total)

    def __call__(self, _place: int, _answer: object) -> None:
        self._done += 1
        self._progress(self._role, self._done, self._total)
