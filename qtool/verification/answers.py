"""One model's answers to a panel.

Rule: each distinct content is asked once, and in the panel's order, so that two models' answers compare place by place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.inputs.items import Item
from qtool.inputs.panels import Panel
from qtool.scoring.contents import query_content
from qtool.scoring.scorer import Answered, Scorer, unheard
from qtool.verification.rank import Scores

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
    panel: Panel, scorer: Scorer, task: Task, query_instruction: str | None = None, answered: Answered = unheard
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
