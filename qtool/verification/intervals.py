"""How sure a metric is: queries are resampled, since the pairs of one query are not independent.

Rule: a metric with an interval is a function of sums over queries, so that a resample weighs whole queries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

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
    """The BCa interval of `value` of the summed `terms` [queries, k]; None of a single query, which has no spread.

    Where all resamples agree, as with a perfect score, BCa is undefined and the interval is that one number; the rule
    against verdicts on few queries is what guards such a result.
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
