"""Faults of a runtime that the scores of both models prove: each is named only where it explains the artefact's scores.

A fault is a function of the reference's log-odds. It is the cause where its values are several times nearer to the
artefact's scores than the reference's own are, and account for nearly all of their spread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.checks.findings import Finding, finding
from qtool.inputs.panels import Panel
from qtool.scoring.scorer import document_content
from qtool.verify.collect import PanelScores, by_query
from qtool.verify.metrics import Scores

Sides = Sequence[tuple[Panel, PanelScores, PanelScores]]
"""Each panel with the reference's and the artefact's scores."""

SAME: Final = 1e-6
"""Two answers to different texts that differ by less come from no model that has read both."""
_TELLS_APART: Final = 0.5
"""Log-odds between which the reference must spread before equal scores of the artefact mean anything."""
_LEAST: Final = 8
"""Pairs without which nothing is concluded."""
_NEARER: Final = 0.25
"""An explanation must be this much nearer than the reference itself: at most this part of its distance."""
_UNEXPLAINED: Final = 0.1
"""The part of the variance of the artefact's scores that an explanation may leave; NVFP4 leaves up to 0.05 here."""
_FURTHEST: Final = 20.0
"""Log-odds further out are rounded probabilities of 0 and 1."""


def sigmoid(scores: Scores) -> Scores:
    """Probabilities of log-odds."""
    kept: Scores = np.clip(scores, -700.0, 700.0)
    return np.asarray(1.0 / (1.0 + np.exp(-kept)), dtype=np.float64)


def score_faults(target: str, sides: Sides, *, asked_log_odds: bool = False) -> Iterator[Finding]:
    """What is wrong with a reranker's log-odds, or with an embedder's vectors.

    `asked_log_odds` says that the runtime was asked for log-odds and not for probabilities.
    """
    unread = [each for side in sides for each in _unread(target, *side)]
    yield from unread
    if unread or not sides:
        return
    if sides[0][1].vectors is not None:
        yield from _exchanged(target, sides)
        return
    reference = np.concatenate([side[1].scores for side in sides])
    artefact = np.concatenate([side[2].scores for side in sides])
    if len(reference) < _LEAST:
        return
    error = fit(sigmoid(reference), artefact, reference) if asked_log_odds else None
    if error is not None:
        yield finding("served-activated", target, error=f"{error:.2g}")
    else:
        yield from explained(target, reference, artefact)
    yield from list(rounded_scores(target, artefact)) or _clipped(target, reference, artefact)


# Answers that do not depend on the question, or belong to another one.


def _unread(target: str, panel: Panel, reference: PanelScores, artefact: PanelScores) -> Iterator[Finding]:
    if reference.vectors is not None and artefact.vectors is not None:
        if _spread(artefact.vectors) < SAME and _spread(reference.vectors) > 1 - _OTHER:
            yield finding("scores-constant", target, found="one vector", panel=panel.name)
        return
    if len(reference.scores) < 2 or np.ptp(reference.scores) < _TELLS_APART:
        return
    if np.ptp(artefact.scores) < SAME:
        yield finding("scores-constant", target, found=f"{sigmoid(artefact.scores)[0]:.4g}", panel=panel.name)
    elif _alike(_of_queries(panel, reference, artefact)):
        yield finding("scores-no-document", target, panel=panel.name)
    elif _alike(_of_documents(panel, reference, artefact)):
        yield finding("scores-no-query", target, panel=panel.name)


def _spread(vectors: Scores) -> float:
    """One minus the smallest cosine with the first vector."""
    return float(1 - (vectors @ vectors[0]).min())


def _of_queries(panel: Panel, reference: PanelScores, artefact: PanelScores) -> list[tuple[Scores, Scores]]:
    """Both models' scores of each query's documents."""
    return list(zip(by_query(panel, reference.scores), by_query(panel, artefact.scores), strict=True))


def _of_documents(panel: Panel, reference: PanelScores, artefact: PanelScores) -> list[tuple[Scores, Scores]]:
    """Both models' scores of each document under all its queries."""
    groups: dict[Hashable, list[tuple[float, float]]] = {}
    for pair, one, other in zip(panel.pairs, reference.scores, artefact.scores, strict=True):
        groups.setdefault(document_content(pair.document), []).append((one, other))
    arrays = [np.array(scores).T for scores in groups.values()]
    return [(scores[0], scores[1]) for scores in arrays]


def _alike(groups: Sequence[tuple[Scores, Scores]]) -> bool:
    """Whether the artefact gives one score to each group that the reference tells apart, of which there are some."""
    apart = [artefact for reference, artefact in groups if len(reference) > 1 and np.ptp(reference) > _TELLS_APART]
    return len(apart) > 1 and all(np.ptp(artefact) < SAME for artefact in apart)


def _exchanged(target: str, sides: Sides) -> Iterator[Finding]:
    """Vectors that are those of other items."""
    for panel, reference, artefact in sides:
        one, other = reference.vectors, artefact.vectors
        if one is None or other is None or one.shape != other.shape:
            continue
        cosines = other[:_COMPARED] @ one[:_COMPARED].T
        moved = (np.diag(cosines) < _OTHER) & (cosines.max(axis=1) > _EQUAL)
        if moved.sum() >= max(2, len(cosines) / 4):
            yield finding("scores-exchanged", target, count=int(moved.sum()), total=len(cosines), panel=panel.name)


_COMPARED: Final = 1000
_OTHER, _EQUAL = 0.95, 0.98
"""Cosines of vectors of different items, and of one item by two runtimes: NVFP4 leaves 0.98 and more."""


# Scores that are a function of the right ones.


Function = Callable[[Scores], Scores]
TWICE: Final[Mapping[str, Function]] = {
    "sigmoid": sigmoid,
    "softmax over yes and no": lambda scores: np.asarray(np.tanh(scores / 2), dtype=np.float64),
}
"""The log-odds that come of an activation applied to probabilities instead of log-odds."""


def explained(target: str, reference: Scores, artefact: Scores) -> Iterator[Finding]:
    """The fault that makes the artefact's log-odds of the reference's."""
    kept = np.abs(artefact) < _FURTHEST
    if kept.sum() < _LEAST:
        return
    reference, artefact = reference[kept], artefact[kept]
    for activation, function in TWICE.items():
        if (error := fit(function(reference), artefact, reference)) is not None:
            low, high = (f"{value:.3f}" for value in np.sort(sigmoid(artefact))[[0, -1]])
            facts = {"activation": activation, "low": low, "high": high, "error": f"{error:.2g}"}
            yield finding("scores-activated-twice", target, **facts)
            return
    if (error := fit(-reference, artefact, reference)) is not None:
        yield finding("scores-reversed", target, error=f"{error:.2g}")
        return
    probabilities, served = sigmoid(reference), sigmoid(artefact)
    factor, offset = line(probabilities, served)
    rescaled = factor * probabilities + offset
    if abs(factor - 1) > _OTHER_FACTOR and fit(rescaled, served, probabilities, unexplained=_EXACT) is not None:
        yield finding("scores-rescaled", target, factor=f"{factor:.3g}", offset=f"{offset:.3g}")
        return
    factor = float(artefact @ reference) / max(float(reference @ reference), SAME)
    is_other = factor > 0 and abs(factor - 1) > _OTHER_FACTOR
    if is_other and (error := fit(factor * reference, artefact, reference, unexplained=_EXACT)) is not None:
        yield finding("scores-scaled", target, factor=f"{factor:.3g}", error=f"{error:.2g}")


_OTHER_FACTOR: Final = 0.2
_EXACT: Final = 0.002
"""A line explains much: its slope must be far from 1, and nearly no variance be left."""


def line(x: Scores, y: Scores) -> tuple[float, float]:
    """Slope and offset of the straight line nearest to the points."""
    slope, offset = np.polynomial.polynomial.polyfit(x, y, 1)[::-1]
    return float(slope), float(offset)


def fit(explanation: Scores, found: Scores, plain: Scores, *, unexplained: float = _UNEXPLAINED) -> float | None:
    """The distance (RMSE) of `found` from an explanation of it; None where that explains it no better than `plain`."""
    error, distance = (float(np.sqrt(np.mean((found - each) ** 2))) for each in (explanation, plain))
    if error > _NEARER * distance or error**2 > unexplained * float(np.var(found)):
        return None
    return error


# Scores of few digits.

_DIGITS: Final = 4
_DISTINCT: Final = 3
_INSIDE: Final = 0.001
"""Probabilities nearer to 0 or 1 look rounded although they are not."""


def rounded_scores(target: str, log_odds: Scores) -> Iterator[Finding]:
    """Probabilities of four decimals or fewer, or log-odds of two."""
    probabilities = sigmoid(log_odds)
    inside = (probabilities > _INSIDE) & (probabilities < 1 - _INSIDE)
    found = list(rounded(target, "probabilities", probabilities[inside], _DIGITS))
    yield from found or rounded(target, "log-odds", log_odds[np.abs(log_odds) < _FURTHEST], _DIGITS // 2)


_CLIPPED: Final = 3


def _clipped(target: str, reference: Scores, artefact: Scores) -> Iterator[Finding]:
    """Least or largest scores that are equal although the reference tells them apart, and are not 0 or 1."""
    for name, end in (("largest", artefact.max()), ("smallest", artefact.min())):
        ties = np.abs(artefact - end) < SAME
        is_inside = _INSIDE < sigmoid(np.array([end]))[0] < 1 - _INSIDE
        if is_inside and ties.sum() >= _CLIPPED and np.ptp(reference[ties]) > 2 * _TELLS_APART:
            facts = {"which": name, "count": int(ties.sum()), "value": f"{sigmoid(np.array([end]))[0]:.4g}"}
            yield finding("scores-clipped", target, **facts)


def rounded(target: str, what: str, values: NDArray[np.float64], most: int) -> Iterator[Finding]:
    """Numbers that are all rounded to `most` decimals or fewer: a bfloat16 between 0.001 and 0.999 has more of them."""
    if len(values) < _LEAST:
        return
    for digits in range(most + 1):
        scaled = values * 10.0**digits
        if np.abs(scaled - np.round(scaled)).max() < 1e-3 and len(np.unique(np.round(scaled))) >= _DISTINCT:
            yield finding("scores-rounded", target, what=what, digits=digits)
            return
