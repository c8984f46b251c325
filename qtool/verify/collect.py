"""Collects the scores of each role: the reference, the reference in bf16, the artefact."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final

import numpy as np

from qtool.arch.spec import Task
from qtool.errors import ModelError
from qtool.inputs.items import Item
from qtool.inputs.panels import Panel, PanelShard
from qtool.progress import StageProgress, ignore
from qtool.scoring.cache import open_cache
from qtool.scoring.ledger import AnswerStore, open_ledger
from qtool.scoring.remembering import Remembering
from qtool.scoring.runtime import open_runtime
from qtool.scoring.scorer import AnswerCounter, Answered, Identity, Scorer, query_content, shortened
from qtool.verify.case import Case, LocatedCase, Role, answer_file, artefact_runtime, checkpoint_runtime
from qtool.verify.metrics import Scores
from qtool.verify.report import Side

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


def collect_scores(case: Case, role: Role, scorer: Scorer, progress: StageProgress) -> RoleScores:
    """The scores of a role on its panels; `scorer` is asked only what neither the cache nor an earlier run has answered."""
    started = time.monotonic()
    panels = role_panels(case, role, case.panels, case.options.shard)
    counter = AnswerCounter(role.value, sum(_questions(case, panel) for panel in panels), progress)
    with ExitStack() as opened:
        stores = [opened.enter_context(closing(store)) for store in _stores(case, role, scorer.identity)]
        remembering = Remembering(scorer, stores) if stores else scorer
        scores = tuple(score_panel(panel, remembering, case.task, case.query_instruction, counter) for panel in panels)
    return RoleScores(_side(case, role, scorer.identity), scores, time.monotonic() - started)


def _questions(case: Case, panel: Panel) -> int:
    """How many questions a panel is: its pairs, or its distinct items."""
    return len(panel.pairs if case.task is Task.RERANK else _distinct_items(panel, case.query_instruction)[0])


def _stores(case: Case, role: Role, identity: Identity) -> Iterator[AnswerStore]:
    if case.options.use_cache and (cache := open_cache(identity)) is not None:
        yield cache
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
