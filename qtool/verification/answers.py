"""One model's answers to a panel, and two models' answers side by side.

Rule: both models get the same items in the same order; an embedder's vectors are compared item by item, and its
rankings are those of cosine similarities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import ImageSource, Item, Pair
from qtool.inputs.panels import Panel
from qtool.scoring.scorer import Answered, Scorer
from qtool.verification.metrics import QueryScores, embed_metrics, rerank_metrics
from qtool.verification.report import PairDelta, PanelReport

Scores = NDArray[np.float64]
WORST_KEPT: Final = 10
_EXCERPT: Final = 60
_Content = tuple[tuple[str, ...], tuple[ImageSource, ...], tuple[str, ...], str | None]


@dataclass(frozen=True)
class Answers:
    """Scores [pairs] in the panel's order; of an embedder also its vectors [items, dim] of the distinct items."""

    scores: Scores
    vectors: Scores | None = None


def work(panel: Panel, task: Task, scorer_instruction: str | None = None) -> int:
    """How many pairs or distinct items a scorer has to answer."""
    return len(panel.pairs) if task is Task.RERANK else len(_distinct(panel, scorer_instruction)[0])


def answer(panel: Panel, scorer: Scorer, task: Task, answered: Answered) -> Answers:
    """Score or embed everything in the panel."""
    if task is Task.RERANK:
        return Answers(np.asarray(scorer.score(panel.pairs, answered), dtype=np.float64))
    items, places = _distinct(panel, scorer.query_instruction)
    return _similarities(scorer.embed(items, answered).astype(np.float64), places)


def shortened(panel: Panel, answers: Answers, dimensions: int, query_instruction: str | None) -> Answers:
    """What an embedder's vectors say when cut to their first `dimensions` and normalised again (MRL)."""
    if answers.vectors is None or not 0 < dimensions <= answers.vectors.shape[1]:
        raise UsageError(f"There are no vectors of {dimensions} dimensions here.")
    cut = answers.vectors[:, :dimensions]
    return _similarities(cut / np.linalg.norm(cut, axis=1, keepdims=True), _distinct(panel, query_instruction)[1])


def _similarities(vectors: Scores, places: Sequence[tuple[int, int]]) -> Answers:
    queries, documents = (vectors[list(side)] for side in zip(*places, strict=True))
    return Answers(np.einsum("nd,nd->n", queries, documents), vectors)


def _distinct(panel: Panel, query_instruction: str | None) -> tuple[list[Item], list[tuple[int, int]]]:
    """The items to embed, each content once, and for each pair the places of its query and document among them."""
    places: dict[_Content, int] = {}
    items: list[Item] = []

    def place(item: Item) -> int:
        content = (item.text, item.image, item.video, item.instruction)
        if content not in places:
            places[content] = len(items)
            items.append(item)
        return places[content]

    return items, [
        (place(query.item.with_instruction(query.item.instruction or query_instruction)), place(document))
        for query in panel.queries
        for document in query.documents
    ]


def compare(panel: Panel, reference: Answers, artefact: Answers) -> PanelReport:
    """Metrics and worst pairs of a panel that both models answered."""
    queries = _by_query(panel, reference.scores, artefact.scores)
    if reference.vectors is None or artefact.vectors is None:
        metrics = rerank_metrics(queries)
    else:
        metrics = embed_metrics(queries, _cosines(reference.vectors, artefact.vectors))
    return PanelReport(
        name=panel.name,
        sha256=panel.sha256,
        license=panel.license,
        modality=panel.modality,
        queries=len(panel.queries),
        pairs=len(panel.pairs),
        metrics=metrics,
        worst=_worst(panel, reference.scores, artefact.scores),
        scores=tuple(zip(reference.scores.tolist(), artefact.scores.tolist(), strict=True)),
    )


def _cosines(reference: Scores, artefact: Scores) -> Scores:
    if reference.shape != artefact.shape:
        raise ModelError(
            f"The artefact's vectors have {artefact.shape[1]} dimensions, the reference's {reference.shape[1]}."
        )
    products: Scores = np.einsum("nd,nd->n", reference, artefact)
    return products


def _by_query(panel: Panel, reference: Scores, artefact: Scores) -> list[QueryScores]:
    ends = np.cumsum([len(query.documents) for query in panel.queries])[:-1]
    labels = (None if query.labels is None else np.array(query.labels) for query in panel.queries)
    return [
        QueryScores(*scores) for scores in zip(np.split(reference, ends), np.split(artefact, ends), labels, strict=True)
    ]


def _worst(panel: Panel, reference: Scores, artefact: Scores) -> tuple[PairDelta, ...]:
    delta = artefact - reference
    order: Sequence[int] = np.argsort(-np.abs(delta), kind="stable")[:WORST_KEPT].tolist()
    pairs = panel.pairs
    return tuple(
        PairDelta(
            query_id=pairs[index].query.id,
            document_id=pairs[index].document.id,
            query=excerpt(pairs[index].query),
            document=excerpt(pairs[index].document),
            label=pairs[index].document.label,
            modality=modality_of(pairs[index]),
            reference=float(reference[index]),
            artefact=float(artefact[index]),
            delta=float(delta[index]),
        )
        for index in order
    )


def modality_of(pair: Pair) -> str:
    """`text`, or the one other thing that the pair holds, or `mixed` of pictures and videos."""
    kinds = {kind for item in (pair.query, pair.document) for kind in ("image", "video") if getattr(item, kind)}
    return "mixed" if len(kinds) > 1 else next(iter(kinds), "text")


def excerpt(item: Item) -> str:
    """A few words or a file's name by which a person knows the item."""
    shown = " ".join((*map(_picture_name, item.image), *item.joined_text.split()))
    return shown if len(shown) <= _EXCERPT else f"{shown[: _EXCERPT - 1]}…"


def _picture_name(source: ImageSource) -> str:
    if not isinstance(source, str) or source.startswith("data:"):
        return "[picture]"
    return f"[{source.rsplit('/', 1)[-1]}]"
