"""The metrics that compare two models' scores of one panel, and their confidence intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Task

# Two rankings of one query's documents. A tie is never broken by the panel's order, which may list the relevant documents
# first: every order of tied documents counts the same.


Scores = NDArray[np.float64]

CUTOFF: Final = 10
TOP: Final = 5


def kendall_tau(reference: Scores, artefact: Scores) -> float | None:
    """Kendall's τ-b; 0 where the artefact scores all documents alike, None where the reference does."""
    # scipy.stats.kendalltau treats ties alike, but gives 0.9999999999999999 for two equal rankings of 5, 6, 8 or 10
    # documents, which `kendall_tau: {min: 1}` would fail, and takes eight times as long at a panel's size.
    above = np.triu_indices(len(reference), k=1)
    wanted = np.sign(reference[:, None] - reference)[above]
    found = np.sign(artefact[:, None] - artefact)[above]
    if not wanted.any():
        return None
    if not found.any():
        return 0.0
    return float(wanted @ found / np.sqrt((wanted @ wanted) * (found @ found)))


def weighted_tau(reference: Scores, artefact: Scores) -> float | None:
    """Vigna's weighted τ (hyperbolic weights, by both rankings); as for `kendall_tau`, 0 or None where all scores are alike."""
    from scipy.stats import weightedtau

    if np.ptp(reference) == 0:
        return None
    return 0.0 if np.ptp(artefact) == 0 else float(weightedtau(reference, artefact).statistic)


def top_agreement(reference: Scores, artefact: Scores, top: int) -> float | None:
    """The expected share of the artefact's first `top` documents that the reference has there; None of `top` or fewer."""
    if len(reference) <= top:
        return None
    wanted = reference >= np.sort(reference)[-top]
    return float(_chance_of_top(artefact, top)[wanted].sum() / top)


def _chance_of_top(scores: Scores, top: int) -> Scores:
    """Each document's probability of being among the first `top`, with ties broken at random."""
    last = np.sort(scores)[-top]
    above, tied = scores > last, scores == last
    return np.asarray(above + tied * ((top - above.sum()) / tied.sum()), dtype=np.float64)


def flips(reference: Scores, artefact: Scores, margin: float) -> tuple[int, int]:
    """The pairs of documents that the artefact orders otherwise, and all pairs that the reference scores `margin` apart."""
    above, below = np.nonzero(reference[:, None] - reference > margin)
    return int((artefact[above] <= artefact[below]).sum()), len(above)


def reciprocal_rank(labels: Scores, scores: Scores) -> float | None:
    """One over the rank of the first relevant document, in expectation over ties; None where there is none."""
    if not (labels > 0).any():
        return None
    best = scores[labels > 0].max()
    before, tied = int((scores > best).sum()), scores == best
    size, relevant = int(tied.sum()), int((labels[tied] > 0).sum())
    return sum(chance / (before + place) for place, chance in _first_places(size, relevant))


def _first_places(size: int, relevant: int) -> Iterator[tuple[int, float]]:
    """The places within a tie that its first relevant document can have, each with its probability."""
    chance = relevant / size
    for place in range(1, size - relevant + 2):
        yield place, chance
        chance *= (size - place - relevant + 1) / max(size - place, 1)


def ndcg(labels: Scores, scores: Scores, cutoff: int = CUTOFF) -> float | None:
    """The nDCG at `cutoff` with gain 2^label - 1, in expectation over ties; None where no document is relevant."""
    gains = np.exp2(labels) - 1
    ideal = _dcg(gains, gains, cutoff)
    return _dcg(gains, scores, cutoff) / ideal if ideal > 0 else None


def _dcg(gains: Scores, scores: Scores, cutoff: int) -> float:
    # A tied document has each place of its tie equally often, so all of them get the tie's mean gain.
    _, tie = np.unique(-scores, return_inverse=True)
    expected = np.bincount(tie, weights=gains) / np.bincount(tie)
    ranked = expected[np.sort(tie)][:cutoff]
    discounts = 1 / np.log2(np.arange(2, len(ranked) + 2))
    return float(ranked @ discounts)


# Confidence intervals. Queries are resampled, since the pairs of one query are not independent. A metric with an interval
# is a function of sums over queries, so that a resample weighs whole queries.


Sums = Sequence[Any]
"""One sum over queries for each term of a metric: a number, or an array of one for each resample."""

CONFIDENCE: Final = 0.90
"""Two-sided, so that each end alone is a 95 % bound."""

_RESAMPLES: Final = 4999
_SEED: Final = 0


@dataclass(frozen=True)
class Interval:
    """A two-sided 90 % BCa interval, so that each end is a one-sided 95 % bound."""

    low: float
    high: float


def bca_interval(terms: NDArray[np.float64], value: Callable[[Sums], Any]) -> Interval | None:
    """The BCa interval of `value` of the summed `terms` [queries, k]; None for a single query, which has no spread.

    Where all resamples agree, as with a perfect score, BCa is undefined and the interval is that one number; that a gate
    needs enough queries (gates.LEAST_QUERIES) guards against trusting it.
    """
    point = float(value(terms.sum(axis=0)))
    if len(terms) < 2:
        return None
    found = _bootstrap(terms, value)
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():
        known = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (point, point)
    return Interval(min(float(low), point), max(float(high), point))


def _bootstrap(terms: NDArray[np.float64], value: Callable[[Sums], Any]) -> Any:
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        return bootstrap(
            tuple(terms.T),
            lambda *columns, axis: value([column.sum(axis=axis) for column in columns]),
            paired=True,
            vectorized=True,
            method="BCa",
            confidence_level=CONFIDENCE,
            n_resamples=_RESAMPLES,
            rng=np.random.default_rng(_SEED),
        )


# The metrics by name. Means are taken over queries, distances over pairs; a metric that the panel cannot give (no labels,
# no query of two documents) is absent.


MRL_DIMENSIONS: Final = (64, 128, 256, 512, 1024, 2048)
"""An embedder's vectors are also compared cut to these dimensions, where they have more."""

RANKING: Final = (
    "kendall_tau",
    "weighted_tau",
    "top1_agreement",
    "top5_agreement",
    "decisive_flips",
    "ndcg10_reference",
    "ndcg10_artefact",
    "ndcg10_drop",
    "recovery",
    "mrr_reference",
    "mrr_artefact",
    "mrr_drop",
)
_MATRIX_ITEMS: Final = 2000
_DISTANCES: Final = ("rmse", "rmse_centred", "bias", "slope", "p50", "p95", "p99", "max")
_DRIFTS: Final = ("vector_rmse", "vector_rmse_centred", "vector_bias")
_VECTORS: Final = ("cosine_p50", "cosine_p1", "cosine_min", "similarity_spearman")
METRICS: Final[Mapping[Task, tuple[str, ...]]] = {
    Task.RERANK: (*(f"log_odds_{name}" for name in _DISTANCES), *RANKING),
    Task.EMBED: (
        *_DRIFTS,
        *_VECTORS,
        *(f"{name}_mrl{dimensions}" for dimensions in MRL_DIMENSIONS for name in _VECTORS),
        *(f"similarity_{name}" for name in _DISTANCES),
        *RANKING,
    ),
}
"""Every metric of a task, in the order of the report."""


@dataclass(frozen=True)
class QueryScores:
    """Both models' scores of one query's documents: log-odds of a reranker, cosine similarities of an embedder.

    `vectors` are sums over the items that this query is the first to have, of an embedder: see `vector_errors`.
    """

    reference: Scores
    artefact: Scores
    labels: Scores | None
    vectors: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class MetricValue:
    """Metrics by name, the intervals of those that have one, and over how many queries each of these was taken."""

    values: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ratio:
    """A metric of sums over queries: the terms that a query adds (None where it adds nothing), and the value of the sums."""

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
    # Rounding leaves a constant reference a little spread.
    return (n * xy - x * y) / np.where(spread > 1e-12 * n * xx, spread, np.nan)


def _ndcg_terms(query: QueryScores) -> tuple[float, ...] | None:
    before, after = (_labelled(ndcg, side)(query) for side in ("reference", "artefact"))
    return None if before is None or after is None else (after, before)


def _centred(sums: Sums) -> Any:
    # Rounding leaves a pure shift a variance of either sign.
    squares, total, count = sums
    return np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))


_DISTANCE_RATIOS: Final = {
    "rmse": _Ratio(_squares, lambda sums: np.sqrt(sums[0] / sums[2])),
    "rmse_centred": _Ratio(_squares, _centred),
    "bias": _Ratio(_squares, lambda sums: sums[1] / sums[2]),
    "slope": _Ratio(_moments, _slope),
}
_DRIFT_RATIOS: Final = {
    "vector_rmse": _Ratio(lambda query: query.vectors, lambda sums: np.sqrt(sums[0] / sums[2])),
    "vector_rmse_centred": _Ratio(lambda query: query.vectors, lambda sums: np.sqrt(sums[1] / sums[2])),
    "vector_bias": _Ratio(
        lambda query: query.vectors, lambda sums: np.sqrt(np.maximum(sums[0] - sums[1], 0) / sums[2])
    ),
}
_RANKING_RATIOS: Final = {
    "kendall_tau": _mean(lambda query: kendall_tau(query.reference, query.artefact)),
    "weighted_tau": _mean(lambda query: weighted_tau(query.reference, query.artefact)),
    "top1_agreement": _mean(lambda query: top_agreement(query.reference, query.artefact, 1)),
    "top5_agreement": _mean(lambda query: top_agreement(query.reference, query.artefact, TOP)),
    "ndcg10_reference": _mean(_labelled(ndcg, "reference")),
    "ndcg10_artefact": _mean(_labelled(ndcg, "artefact")),
    "ndcg10_drop": _drop(ndcg),
    "recovery": _Ratio(_ndcg_terms, lambda sums: 100 * sums[0] / sums[1]),
    "mrr_reference": _mean(_labelled(reciprocal_rank, "reference")),
    "mrr_artefact": _mean(_labelled(reciprocal_rank, "artefact")),
    "mrr_drop": _drop(reciprocal_rank),
}


def measure(what: str, queries: Sequence[QueryScores], margin: float | None = None) -> MetricValue:
    """Distances named `what`_… and rankings; a decisive flip exchanges documents further apart than `margin`."""
    found = query_terms(what, queries, margin)
    intervals = {name: bca_interval(each.terms, each.value) for name, each in found.items()}
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    counts = {name: len(each.terms) for name, each in found.items()}
    values = {name: each.point for name, each in found.items()}
    return MetricValue({**values, **quantiles(what, queries)}, known, counts)


@dataclass(frozen=True)
class QueryTerms:
    """A metric as a function of sums over queries: what each query adds to them [queries, k], and the value of the sums."""

    terms: NDArray[np.float64]
    value: Callable[[Sums], Any]

    @property
    def point(self) -> float:
        """The metric."""
        return float(self.value(self.terms.sum(axis=0)))


def query_terms(what: str, queries: Sequence[QueryScores], margin: float | None = None) -> dict[str, QueryTerms]:
    """Every metric of sums over queries that these queries give, by name; queries that add nothing to one are left out of it."""
    ratios = {f"{what}_{name}": ratio for name, ratio in _DISTANCE_RATIOS.items()} | _DRIFT_RATIOS | _RANKING_RATIOS
    if margin is not None:
        ratios["decisive_flips"] = _flips(margin)
    taken = {name: (_taken(ratio, queries), ratio) for name, ratio in ratios.items()}
    return {name: QueryTerms(terms, ratio.value) for name, (terms, ratio) in taken.items() if _is_known(ratio, terms)}


def distances(what: str, queries: Sequence[QueryScores]) -> dict[str, float]:
    """The distances named `what`_…, without intervals."""
    taken = {name: (ratio, _taken(ratio, queries)) for name, ratio in _DISTANCE_RATIOS.items()}
    known = {name: ratio.value(terms.sum(axis=0)) for name, (ratio, terms) in taken.items() if _is_known(ratio, terms)}
    return {**{f"{what}_{name}": float(value) for name, value in known.items()}, **quantiles(what, queries)}


def vector_errors(reference: Scores, artefact: Scores, owner: NDArray[np.intp], queries: int) -> Scores:
    """Sums [queries, 3] over the items of each query: |Δ|², |Δ minus the mean of all Δ|², and their number.

    Δ is the difference of an item's two unit vectors [items, dim], `owner` the query to which each item counts. The mean
    is that of all items, in every resample of queries, too: how far it would move is of the order of one item in all.
    """
    delta = artefact - reference
    rest = delta - delta.mean(axis=0)
    sums = np.zeros((queries, 3))
    np.add.at(sums, owner, np.column_stack([(delta**2).sum(axis=1), (rest**2).sum(axis=1), np.ones(len(delta))]))
    return sums


def vector_metrics(reference: Scores, artefact: Scores) -> dict[str, float]:
    """Compares two models' unit vectors [items, dim], item by item and by their matrices of similarities.

    The matrices are compared by Spearman correlation over all pairs of items, or of 2,000 of them drawn with a fixed seed;
    with fewer than three items it is absent.
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
        flipped, decisive = flips(query.reference, query.artefact, margin)
        return (float(flipped), float(decisive)) if decisive else None

    return _Ratio(terms, lambda sums: sums[0] / sums[1])


def _taken(ratio: _Ratio, queries: Sequence[QueryScores]) -> NDArray[np.float64]:
    terms = [terms for query in queries if (terms := ratio.terms(query)) is not None]
    return np.array(terms, dtype=np.float64)


def _is_known(ratio: _Ratio, terms: NDArray[np.float64]) -> bool:
    with np.errstate(invalid="ignore", divide="ignore"):
        return len(terms) > 0 and bool(np.isfinite(ratio.value(terms.sum(axis=0))))


def quantiles(what: str, queries: Sequence[QueryScores]) -> dict[str, float]:
    """Percentiles and the largest of |Δ| over all pairs, named `what`_…."""
    delta = np.abs(np.concatenate([query.artefact - query.reference for query in queries]))
    p50, p95, p99 = np.percentile(delta, [50, 95, 99])
    return {
        f"{what}_p50": float(p50),
        f"{what}_p95": float(p95),
        f"{what}_p99": float(p99),
        f"{what}_max": float(delta.max()),
    }
