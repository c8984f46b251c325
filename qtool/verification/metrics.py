"""What two models' answers to one panel say about each other.

Rule: a metric is one number with one name; means are taken over queries, distances over pairs, and a metric that the
panel cannot give (no labels, no query of two documents) is absent rather than guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Task
from qtool.verification import rank
from qtool.verification.intervals import Interval, Sums, bca_interval
from qtool.verification.rank import Scores

MRL_DIMENSIONS: Final = (64, 128, 256, 512, 1024, 2048)
"""Prefixes of an embedder's vectors that are compared too, where the vectors are longer."""

RANKING: Final = (
    "kendall_tau", "weighted_tau", "top1_agreement", "top5_agreement", "decisive_flips", "ndcg10_reference",
    "ndcg10_artefact", "ndcg10_drop", "recovery", "mrr_reference", "mrr_artefact", "mrr_drop",
)  # fmt: skip
_MATRIX_ITEMS: Final = 2000
_DISTANCES: Final = ("rmse", "bias", "slope", "p50", "p95", "p99", "max")
_VECTORS: Final = ("cosine_p50", "cosine_p1", "cosine_min", "similarity_spearman")
METRICS: Final[Mapping[Task, tuple[str, ...]]] = {
    Task.RERANK: (*(f"log_odds_{name}" for name in _DISTANCES), *RANKING),
    Task.EMBED: (
        *_VECTORS,
        *(f"{name}_mrl{dimensions}" for dimensions in MRL_DIMENSIONS for name in _VECTORS),
        *(f"similarity_{name}" for name in _DISTANCES),
        *RANKING,
    ),
}
"""Every metric of a task, in the order of the report."""


@dataclass(frozen=True)
class QueryScores:
    """Both models' scores of one query's documents: log-odds of a reranker, cosine similarities of an embedder."""

    reference: Scores
    artefact: Scores
    labels: Scores | None


@dataclass(frozen=True)
class Measured:
    """Metrics, the intervals of those that have one, and over how many queries each of these was taken."""

    values: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ratio:
    """A metric made of sums over queries: what each query adds, or None where it has no say, and the value of the sums."""

    terms: Callable[[QueryScores], tuple[float, ...] | None]
    value: Callable[[Sums], Any]


def _mean(of: Callable[[QueryScores], float | None]) -> _Ratio:
    def terms(query: QueryScores) -> tuple[float, ...] | None:
        value = of(query)
        return None if value is None else (value, 1.0)

    return _Ratio(terms, lambda sums: sums[0] / sums[1])


def _labelled(of: Callable[[Scores, Scores], float | None], side: str) -> Callable[[QueryScores], float | None]:
    return lambda query: None if query.labels is None else of(query.labels, getattr(query, side))


def _drop(of: Callable[[Scores, Scores], float | None]) -> _Ratio:
    def lost(query: QueryScores) -> float | None:
        before, after = _labelled(of, "reference")(query), _labelled(of, "artefact")(query)
        return None if before is None or after is None else before - after

    return _mean(lost)


def _squares(query: QueryScores) -> tuple[float, ...]:
    delta = query.artefact - query.reference
    return float(delta @ delta), float(delta.sum()), float(len(delta))


def _moments(query: QueryScores) -> tuple[float, ...]:
    x, y = query.reference, query.artefact
    return float(len(x)), float(x.sum()), float(y.sum()), float(x @ x), float(x @ y)


def _slope(sums: Sums) -> Any:
    n, x, y, xx, xy = sums
    spread = n * xx - x * x
    # Of a constant reference rounding leaves a little spread, which means nothing.
    return (n * xy - x * y) / np.where(spread > 1e-12 * n * xx, spread, np.nan)


def _ndcg_terms(query: QueryScores) -> tuple[float, ...] | None:
    before, after = (_labelled(rank.ndcg, side)(query) for side in ("reference", "artefact"))
    return None if before is None or after is None else (after, before)


_DISTANCE_RATIOS: Final = {
    "rmse": _Ratio(_squares, lambda sums: np.sqrt(sums[0] / sums[2])),
    "bias": _Ratio(_squares, lambda sums: sums[1] / sums[2]),
    "slope": _Ratio(_moments, _slope),
}
_RANKING_RATIOS: Final = {
    "kendall_tau": _mean(lambda query: rank.kendall_tau(query.reference, query.artefact)),
    "weighted_tau": _mean(lambda query: rank.weighted_tau(query.reference, query.artefact)),
    "top1_agreement": _mean(lambda query: rank.top_agreement(query.reference, query.artefact, 1)),
    "top5_agreement": _mean(lambda query: rank.top_agreement(query.reference, query.artefact, rank.TOP)),
    "ndcg10_reference": _mean(_labelled(rank.ndcg, "reference")),
    "ndcg10_artefact": _mean(_labelled(rank.ndcg, "artefact")),
    "ndcg10_drop": _drop(rank.ndcg),
    "recovery": _Ratio(_ndcg_terms, lambda sums: 100 * sums[0] / sums[1]),
    "mrr_reference": _mean(_labelled(rank.reciprocal_rank, "reference")),
    "mrr_artefact": _mean(_labelled(rank.reciprocal_rank, "artefact")),
    "mrr_drop": _drop(rank.reciprocal_rank),
}


def measure(what: str, queries: Sequence[QueryScores], margin: float | None = None) -> Measured:
    """Distances called `what`_… and rankings; documents closer than `margin` in the reference count for no flip."""
    ratios = {f"{what}_{name}": ratio for name, ratio in _DISTANCE_RATIOS.items()} | _RANKING_RATIOS
    if margin is not None:
        ratios["decisive_flips"] = _flips(margin)
    found = {name: _taken(ratio, queries) for name, ratio in ratios.items()}
    kept = {name: terms for name, terms in found.items() if _is_known(ratios[name], terms)}
    values = {name: float(ratios[name].value(terms.sum(axis=0))) for name, terms in kept.items()}
    intervals = {name: bca_interval(terms, ratios[name].value) for name, terms in kept.items()}
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    counts = {name: len(terms) for name, terms in kept.items()}
    return Measured({**values, **_quantiles(what, queries)}, known, counts)


def distances(what: str, queries: Sequence[QueryScores]) -> dict[str, float]:
    """The distances alone, without intervals."""
    taken = {name: (ratio, _taken(ratio, queries)) for name, ratio in _DISTANCE_RATIOS.items()}
    known = {name: ratio.value(terms.sum(axis=0)) for name, (ratio, terms) in taken.items() if _is_known(ratio, terms)}
    return {**{f"{what}_{name}": float(value) for name, value in known.items()}, **_quantiles(what, queries)}


def vector_metrics(reference: Scores, artefact: Scores) -> dict[str, float]:
    """How alike two models' unit vectors [items, dim] are, item by item, and as matrices of similarities.

    The matrices are compared by Spearman correlation over all pairs of distinct items, of at most 2,000 of them, drawn with
    a fixed seed; with fewer than three items it is absent.
    """
    cosines = np.einsum("nd,nd->n", reference, artefact)
    found = {
        "cosine_p50": float(np.percentile(cosines, 50)),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "cosine_min": float(cosines.min()),
    }
    correlation = _spearman(reference, artefact)
    if correlation is not None:
        found["similarity_spearman"] = correlation
    return found


def _spearman(reference: Scores, artefact: Scores) -> float | None:
    from scipy.stats import spearmanr

    if len(reference) > _MATRIX_ITEMS:  # time and memory grow with the square
        drawn = np.random.default_rng(0).choice(len(reference), _MATRIX_ITEMS, replace=False)
        reference, artefact = reference[drawn], artefact[drawn]
    above = np.triu_indices(len(reference), k=1)
    similarities = [(vectors @ vectors.T)[above] for vectors in (reference, artefact)]
    if len(reference) < 3 or any(np.ptp(each) == 0 for each in similarities):
        return None
    return float(spearmanr(*similarities).statistic)


def _flips(margin: float) -> _Ratio:
    def terms(query: QueryScores) -> tuple[float, ...] | None:
        flipped, decisive = rank.flips(query.reference, query.artefact, margin)
        return (float(flipped), float(decisive)) if decisive else None

    return _Ratio(terms, lambda sums: sums[0] / sums[1])


def _taken(ratio: _Ratio, queries: Sequence[QueryScores]) -> NDArray[np.float64]:
    terms = [terms for query in queries if (terms := ratio.terms(query)) is not None]
    return np.array(terms, dtype=np.float64)


def _is_known(ratio: _Ratio, terms: NDArray[np.float64]) -> bool:
    with np.errstate(invalid="ignore", divide="ignore"):
        return len(terms) > 0 and bool(np.isfinite(ratio.value(terms.sum(axis=0))))


def _quantiles(what: str, queries: Sequence[QueryScores]) -> dict[str, float]:
    delta = np.abs(np.concatenate([query.artefact - query.reference for query in queries]))
    p50, p95, p99 = np.percentile(delta, [50, 95, 99])
    return {
        f"{what}_p50": float(p50), f"{what}_p95": float(p95), f"{what}_p99": float(p99), f"{what}_max": float(delta.max()),
    }  # fmt: skip
