"""Comparing two rankings of one query's documents.

Rule: a tie is never broken by the panel's order, which may list the relevant documents first; every possible order of
tied documents counts the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

CUTOFF: Final = 10
TOP: Final = 5


def kendall_tau(reference: Scores, artefact: Scores) -> float | None:
    """Kendall's τ-b; 0 where only the artefact sees all documents alike, None where the reference does."""
    above = np.triu_indices(len(reference), k=1)
    wanted = np.sign(reference[:, None] - reference)[above]
    found = np.sign(artefact[:, None] - artefact)[above]
    if not wanted.any():
        return None
    if not found.any():
        return 0.0
    return float(wanted @ found / np.sqrt((wanted @ wanted) * (found @ found)))


def weighted_tau(reference: Scores, artefact: Scores) -> float | None:
    """Vigna's weighted τ (hyperbolic weights, by both rankings): an exchange at the top costs more than one at the end."""
    from scipy.stats import weightedtau

    if np.ptp(reference) == 0:
        return None
    return 0.0 if np.ptp(artefact) == 0 else float(weightedtau(reference, artefact).statistic)


def top_agreement(reference: Scores, artefact: Scores, top: int) -> float | None:
    """The expected share of the artefact's first `top` documents that the reference has there; None for no more than that."""
    if len(reference) <= top:
        return None
    wanted = reference >= np.sort(reference)[-top]
    return float(_chance_of_top(artefact, top)[wanted].sum() / top)


def _chance_of_top(scores: Scores, top: int) -> Scores:
    """Each document's probability of standing among the first `top`: below 1 only where a tie straddles that place."""
    last = np.sort(scores)[-top]
    above, tied = scores > last, scores == last
    return np.asarray(above + tied * ((top - above.sum()) / tied.sum()), dtype=np.float64)


def flips(reference: Scores, artefact: Scores, margin: float) -> tuple[int, int]:
    """How many pairs of documents the reference orders by more than `margin`, and how many of them stand otherwise."""
    above, below = np.nonzero(reference[:, None] - reference > margin)
    return int((artefact[above] <= artefact[below]).sum()), len(above)


def reciprocal_rank(labels: Scores, scores: Scores) -> float | None:
    """One over the place of the first relevant document, in expectation over ties; None where there is none."""
    if not (labels > 0).any():
        return None
    best = scores[labels > 0].max()
    before, tied = int((scores > best).sum()), scores == best
    size, relevant = int(tied.sum()), int((labels[tied] > 0).sum())
    return sum(chance / (before + place) for place, chance in _first_places(size, relevant))


def _first_places(size: int, relevant: int) -> Iterator[tuple[int, float]]:
    """Where in a tie the first of its relevant documents stands, and how likely: the others all stand behind it."""
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
    # A tied document stands at each place of its tie equally often, so the tie's mean gain stands at all of them.
    _, tie = np.unique(-scores, return_inverse=True)
    expected = np.bincount(tie, weights=gains) / np.bincount(tie)
    ranked = expected[np.sort(tie)][:cutoff]
    discounts = 1 / np.log2(np.arange(2, len(ranked) + 2))
    return float(ranked @ discounts)
