"""What two models' answers to one panel say about each other.

Rule: a metric is one number with one name; means are taken over queries, distances over pairs, and a metric that the
panel cannot give (no labels, no query of two documents) is absent rather than guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Task
from qtool.verification.rank import Scores, kendall_tau, ndcg, top1_agreement

RANKING: Final = ("kendall_tau", "top1_agreement", "ndcg10_reference", "ndcg10_artefact", "ndcg10_drop")
METRICS: Final[Mapping[Task, tuple[str, ...]]] = {
    Task.RERANK: (
        "log_odds_rmse", "log_odds_bias", "log_odds_p50", "log_odds_p95", "log_odds_p99", "log_odds_max", *RANKING,
    ),
    Task.EMBED: (
        "cosine_p50", "cosine_p1", "cosine_min", "similarity_rmse", "similarity_bias", "similarity_p50",
        "similarity_p95", "similarity_p99", "similarity_max", *RANKING,
    ),
}  # fmt: skip
"""Every metric of a task, in the order of the report."""


@dataclass(frozen=True)
class QueryScores:
    """Both models' scores of one query's documents: log-odds of a reranker, cosine similarities of an embedder."""

    reference: Scores
    artefact: Scores
    labels: Scores | None


def rerank_metrics(queries: Sequence[QueryScores]) -> dict[str, float]:
    """The metrics of a reranker."""
    return {**_distances("log_odds", queries), **_ranking(queries)}


def embed_metrics(queries: Sequence[QueryScores], cosines: NDArray[np.float64]) -> dict[str, float]:
    """The metrics of an embedder; `cosines` [n] compare its vector of each item with the reference's."""
    rows = {
        "cosine_p50": float(np.percentile(cosines, 50)),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "cosine_min": float(cosines.min()),
    }
    return {**rows, **_distances("similarity", queries), **_ranking(queries)}


def _distances(what: str, queries: Sequence[QueryScores]) -> dict[str, float]:
    delta = np.concatenate([query.artefact - query.reference for query in queries])
    p50, p95, p99 = np.percentile(np.abs(delta), [50, 95, 99])
    return {
        f"{what}_rmse": float(np.sqrt(np.mean(delta**2))),
        f"{what}_bias": float(delta.mean()),
        f"{what}_p50": float(p50),
        f"{what}_p95": float(p95),
        f"{what}_p99": float(p99),
        f"{what}_max": float(np.abs(delta).max()),
    }


def _ranking(queries: Sequence[QueryScores]) -> dict[str, float]:
    means = {
        "kendall_tau": _mean(queries, kendall_tau),
        "top1_agreement": _mean(queries, top1_agreement),
        "ndcg10_reference": _mean_ndcg(queries, lambda query: query.reference),
        "ndcg10_artefact": _mean_ndcg(queries, lambda query: query.artefact),
    }
    found = {name: mean for name, mean in means.items() if mean is not None}
    if "ndcg10_reference" in found:
        found["ndcg10_drop"] = found["ndcg10_reference"] - found["ndcg10_artefact"]
    return found


def _mean(queries: Sequence[QueryScores], compare: Callable[[Scores, Scores], float | None]) -> float | None:
    return _mean_of(compare(query.reference, query.artefact) for query in queries)


def _mean_ndcg(queries: Sequence[QueryScores], scores: Callable[[QueryScores], Scores]) -> float | None:
    return _mean_of(ndcg(query.labels, scores(query)) for query in queries if query.labels is not None)


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
