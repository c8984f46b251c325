"""Collects the scores of each role: the reference, the reference in bf16, the artefact."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from qtool.arch.spec import Task
from qtool.errors import ModelError
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import Panel, PanelShard
from qtool.progress import StageProgress, duration, ignore
from qtool.scoring.cache import open_cache
from qtool.scoring.ledger import AnswerStore, open_ledger
from qtool.scoring.remembering import Remembering
from qtool.scoring.runtime import open_runtime
from qtool.scoring.scorer import AnswerCounter, Answered, Identity, Scorer, query_content, shortened
from qtool.verify.case import Case, LocatedCase, Role, answer_file, artefact_runtime, checkpoint_runtime
from qtool.verify.metrics import Scores
from qtool.verify.report import AnswerCount, Side

Rows = Sequence[tuple[int, int]]
"""For each pair the rows of its query's and its document's vector."""


@dataclass(frozen=True)
class PanelScores:
    """A model's scores [pairs] of a panel, in its order; an embedder's are cosines, of `vectors` [distinct items, width]."""

    scores: Scores
    vectors: Scores | None = None
    rows: Rows = ()

    @classmethod
    def of_vectors(cls, vectors: Scores, rows: Rows) -> PanelScores:
        """The scores of an embedder."""
        queries, documents = (vectors[list(side)] for side in zip(*rows, strict=True))
        return cls(np.einsum("nd,nd->n", queries, documents), vectors, rows)

    def shortened(self, dimensions: int) -> PanelScores:
        """The scores of vectors that are cut to their first `dimensions` and normalised again (MRL)."""
        if self.vectors is None:
            raise ModelError("A reranker has no vectors to shorten.")
        return self.of_vectors(shortened(self.vectors, dimensions), self.rows)


@dataclass(frozen=True)
class RoleScores:
    """The scores of one role on each panel, what they depend on, and the seconds they took, loading included."""

    side: Side
    panels: tuple[PanelScores, ...]
    seconds: float = 0.0
    count: AnswerCount | None = None


def score_panel(
    panel: Panel, scorer: Scorer, task: Task, query_instruction: str | None = None, answered: Answered = ignore
) -> PanelScores:
    """Score or embed everything in the panel; an embedder's queries get `query_instruction` where the panel gives none."""
    if not panel.queries:
        return PanelScores(np.zeros(0))
    if task is Task.RERANK:
        return PanelScores(np.asarray(scorer.score(panel.pairs, answered), dtype=np.float64))
    items, rows = _distinct_items(panel, query_instruction)
    return PanelScores.of_vectors(scorer.embed(items, answered).astype(np.float64), rows)


def by_query(panel: Panel, scores: Scores) -> list[Scores]:
    """The scores of each query's documents."""
    return np.split(scores, np.cumsum([len(query.documents) for query in panel.queries])[:-1])


def _distinct_items(panel: Panel, query_instruction: str | None) -> tuple[list[Item], Rows]:
    """Each distinct item once, since vectors are compared item by item."""
    row_of: dict[Hashable, int] = {}
    items: list[Item] = []

    def row(item: Item) -> int:
        content = query_content(item)
        if content not in row_of:
            row_of[content] = len(items)
            items.append(item)
        return row_of[content]

    return items, [
        (row(query.item.with_instruction(query.item.instruction or query_instruction)), row(document))
        for query in panel.queries
        for document in query.documents
    ]


# The roles. Opening a runtime reads no weights; every answer is on the disk before it counts.


NOISE_DTYPE: Final = "bfloat16"
STAGE_OF: Final[Mapping[Role, str]] = {
    Role.REFERENCE: "scores of the reference",
    Role.REFERENCE_BF16: "noise",
    Role.ARTEFACT: "scores of the artefact",
}
"""What progress calls the part of a stage in which a role is asked."""

_RATE_SECONDS: Final = 15.0
_RATE_ANSWERS: Final = 4
_WORTH_SAYING: Final = 120.0
"""An estimate is made from so many seconds and answers, and shown where so much time is left."""


def role_panels(case: Case, role: Role, panels: Sequence[Panel], shard: PanelShard | None) -> Sequence[Panel]:
    """What of `panels`, or of a shard of them, a role is asked: the reference in bf16 only the first `noise_queries` of each."""
    if role is not Role.REFERENCE_BF16:
        return panels
    queries = case.options.noise_queries
    share = queries if shard is None else len(range(shard.index - 1, queries, shard.count))
    return [panel.first(share) for panel in panels]


def open_role(case: LocatedCase, role: Role) -> Scorer:
    """The runtime of a role."""
    options = case.options
    if role is Role.ARTEFACT:
        runtime = artefact_runtime(options, case.artefact, case.task, case.reference.family.key)
        return open_runtime(case.artefact or options.artefact, runtime)
    dtype = NOISE_DTYPE if role is Role.REFERENCE_BF16 else options.dtype
    return open_runtime(case.reference, checkpoint_runtime(options, case.task, dtype))


def collect_scores(
    case: Case, role: Role, scorer: Scorer, progress: StageProgress, status: Callable[[str], None] = ignore
) -> RoleScores:
    """The scores of a role on its panels; `scorer` is asked only what neither the cache nor an earlier run has answered."""
    started = time.monotonic()
    panels = role_panels(case, role, case.panels, case.options.shard)
    total = sum(_questions(case, panel) for panel in panels)
    counter = _Counter(role, total, AnswerCounter(STAGE_OF[role], total, progress), status)
    with ExitStack() as opened:
        stores = [opened.enter_context(closing(store)) for store in _stores(case, role, scorer.identity)]
        asked = cast("Scorer", _Asked(scorer, counter))
        remembering = Remembering(asked, stores) if stores else asked
        scores = tuple(score_panel(panel, remembering, case.task, case.query_instruction, counter) for panel in panels)
    side = _side(case, role, scorer.identity)
    return RoleScores(side, scores, time.monotonic() - started, counter.count(role))


class _Counter:
    """Counts answers by where they come from, and says once how long those that must be computed will take."""

    def __init__(self, role: Role, total: int, counter: AnswerCounter, status: Callable[[str], None]) -> None:
        self._stage, self._total, self._counter, self._status = STAGE_OF[role], total, counter, status
        self._asked = self._kept = 0
        self._began = 0.0
        self._is_estimated = False
        self.is_asking = False

    def __call__(self, index: int, answer: object) -> None:
        """Count one answer."""
        self._counter(index, answer)
        if not self.is_asking:
            self._kept += 1
            return
        self._asked += 1
        if not self._is_estimated:
            self._estimate(time.monotonic() - self._began)

    def begin(self) -> None:
        """A scorer is about to be asked."""
        self._began = self._began or time.monotonic()

    def count(self, role: Role) -> AnswerCount:
        """What was counted."""
        return AnswerCount(role=role.value, asked=self._asked, kept=self._kept)

    def _estimate(self, seconds: float) -> None:
        if seconds < _RATE_SECONDS or self._asked < _RATE_ANSWERS:
            return
        self._is_estimated = True
        left = (self._total - self._asked - self._kept) * seconds / self._asked
        if left >= _WORTH_SAYING:
            self._status(
                f"{self._stage}: about {duration(left)} left for {self._total:,} answers; --limit N takes the first N "
                "queries of each panel."
            )


class _Asked:
    """A scorer that tells the counter which answers are its own."""

    def __init__(self, scorer: Scorer, counter: _Counter) -> None:
        self._scorer, self._counter = scorer, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        self._counter.begin()
        return self._scorer.score(pairs, self._own(answered))

    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> Any:
        self._counter.begin()
        return self._scorer.embed(items, self._own(answered))

    def _own(self, answered: Answered) -> Answered:
        def on_answer(index: int, answer: object) -> None:
            self._counter.is_asking = True
            answered(index, answer)
            self._counter.is_asking = False

        return on_answer


def _questions(case: Case, panel: Panel) -> int:
    """How many questions a panel is: its pairs, or its distinct items."""
    return len(panel.pairs if case.task is Task.RERANK else _distinct_items(panel, case.query_instruction)[0])


def _stores(case: Case, role: Role, identity: Identity) -> Iterator[AnswerStore]:
    if case.options.use_cache and (cache := open_cache(identity)) is not None:
        yield cache
    if case.shared is not None and role is not Role.ARTEFACT:
        yield case.shared.answers(identity)
    if case.options.output is not None:
        yield open_ledger(answer_file(case.options.output, role), identity)


def _side(case: Case, role: Role, identity: Identity) -> Side:
    return Side(
        name=case.options.artefact if role is Role.ARTEFACT else case.options.reference,
        engine=identity.engine,
        numbers=identity.numbers,
        sha256=identity.model if identity.is_pinned else None,
        prompt_sha256=identity.prompt,
    )
