"""Comparing two rankings of one query's documents.

Rule: a tie is never broken by the panel's order, which may list the relevant documents first; every possible order of
tied documents counts the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

CUTOFF: Final = 10


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


def top1_agreement(reference: Scores, artefact: Scores) -> float | None:
    """Probability that the artefact's first document is one that the reference puts first; None for a single one."""
    if len(reference) < 2:
        return None
    ours = artefact == artefact.max()
    return float((reference == reference.max())[ours].mean())


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
