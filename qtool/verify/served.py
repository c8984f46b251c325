"""Faults that a server shows only when it is asked again: alone, in another order, without its cache, about longer texts.

Whatever cannot be asked (a server refuses it, or fails) is not judged. Differences that bf16 and another batch size make
are no fault: on one pair up to 0.2 log-odds were seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Task
from qtool.checks.findings import Finding, finding
from qtool.checks.prompts import KnownPrompts, Rereader
from qtool.errors import QtoolError
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import Panel
from qtool.scoring.http.engine import DOCUMENTS_AT_ONCE, DeafError, ScaleError
from qtool.scoring.http.runtime import HttpScorer
from qtool.scoring.scorer import Scorer, distinct_pairs, log_odds
from qtool.verify.case import LocatedCase
from qtool.verify.collect import PanelScores, by_query
from qtool.verify.faults import SAME, explained, fit, line, rounded, sigmoid
from qtool.verify.metrics import Scores

_LOG_ODDS: Final = 0.5
_PROBABILITY: Final = 0.02
"""Two answers to one question differ where both their log-odds and their probabilities are so far apart."""
_COSINE: Final = 0.99
"""Two vectors of one item differ where their cosine is less: bf16 and another batch leave 0.9999."""


def served_faults(case: LocatedCase, scorer: HttpScorer, scores: Sequence[PanelScores]) -> list[Finding]:
    """What the server that gave `scores` of the case's panels is found to do when it is asked again."""
    target, panels = case.options.artefact, list(zip(case.panels, scores, strict=True))
    if case.task is Task.EMBED:
        return list(_vector_faults(target, scorer, panels, case.query_instruction))
    requests = _requests(panels)
    found = list(_request_faults(target, scorer, requests)) if requests else []
    if not found and requests:
        found += _ignored_query(target, scorer, requests)
    if not found and requests:
        found += _cut(target, "score", case.panels, requests[0].pairs[0].query, _scored(scorer))
    return [*found, *_instructions(target, scorer, case.panels)]


# Pairs. The same documents of a query are asked together twice, in another order, and each alone.


@dataclass(frozen=True)
class Request:
    """Documents of one query that are asked together, and what the run's own request for them gave."""

    pairs: tuple[Pair, ...]
    first: Scores


def _requests(panels: Sequence[tuple[Panel, PanelScores]]) -> list[Request]:
    """Of each panel the query, past the first (which the prompt stage has asked), whose documents differ most."""
    found = []
    for panel, scores in panels:
        candidates = []
        for query, values in zip(panel.queries, by_query(panel, scores.scores), strict=True):
            chosen = [same[0] for same in distinct_pairs(query.pairs)][:DOCUMENTS_AT_ONCE]
            candidates.append(Request(tuple(query.pairs[index] for index in chosen), values[chosen]))
        several = [each for each in candidates[1:] or candidates if len(each.pairs) > 1]
        found += sorted(several, key=lambda each: -float(np.ptp(each.first)))[:_QUERIES]
    return found[: 2 * _QUERIES]


_QUERIES: Final = 2


@dataclass(frozen=True)
class _Asked:
    """A request with the answers to all the ways in which it was asked."""

    pairs: tuple[Pair, ...]
    first: Scores
    again: Scores
    once_more: Scores
    turned: Scores
    alone: Scores
    beside: Scores
    uncached: Scores | None


def _ask(scorer: HttpScorer, request: Request) -> _Asked:
    pairs = request.pairs
    uncached = scorer.uncached(pairs)
    again, once_more = np.array(scorer.together(pairs)), np.array(scorer.together(pairs))
    turned = np.array(scorer.together(pairs[::-1]))[::-1]
    alone = np.array([scorer.together([pair])[0] for pair in pairs])
    with ThreadPoolExecutor(len(pairs)) as pool:
        beside = np.array([scores[0] for scores in pool.map(lambda pair: scorer.together([pair]), pairs)])
    known = None if uncached is None else np.array(uncached)
    return _Asked(pairs, request.first, again, once_more, turned, alone, beside, known)


def _request_faults(target: str, scorer: HttpScorer, requests: Sequence[Request]) -> Iterator[Finding]:
    """The first of the faults, in an order in which none is the reason for a later one."""
    asked = []
    for request in requests:
        with suppress(QtoolError):
            asked.append(_ask(scorer, request))
    if not asked:
        return
    alone = np.concatenate([each.alone for each in asked])
    if np.ptp(alone) < SAME and np.ptp(np.concatenate([each.again for each in asked])) < SAME:
        yield from _one_token(target, scorer, asked[0].pairs[0])
        return
    changes: tuple[tuple[str, Callable[[_Asked], Scores | None], Callable[[_Asked], Scores]], ...] = (
        ("served-unsteady", lambda each: each.again, lambda each: each.once_more),
        ("served-warm-prefix", lambda each: each.uncached, lambda each: each.again),
    )
    for code, before, after in changes:
        if found := _changed(target, code, asked, before, after):
            yield found
            return
    if found := _relative(target, asked):
        yield found
        return
    if found := _changed(target, "served-batch", asked, lambda each: each.alone, lambda each: each.again):
        yield _exchanged(target, asked) or found
        return
    for code, before, after in (
        ("served-batch", lambda each: each.again, lambda each: each.turned),
        ("served-concurrent", lambda each: each.alone, lambda each: each.beside),
        ("served-changes", lambda each: each.first, lambda each: each.again),
    ):
        if found := _changed(target, code, asked, before, after):
            yield found
            return


def _changed(
    target: str,
    code: str,
    asked: Sequence[_Asked],
    before: Callable[[_Asked], Scores | None],
    after: Callable[[_Asked], Scores],
) -> Finding | None:
    """The finding `code` where answers to the same questions differ; it shows the pair that differs most."""
    known = [(pair, one, other, len(each.pairs)) for each in asked for pair, one, other in _sides(each, before, after)]
    differing = [each for each in known if differs(each[1], each[2])]
    if not differing:
        return None
    pair, one, other, documents = max(differing, key=lambda each: abs(_p(each[1]) - _p(each[2])))
    facts = {"expected": f"{_p(one):.4g}", "found": f"{_p(other):.4g}", "documents": documents}
    return finding(code, target, question=pair.name, count=len(differing), total=len(known), **facts)


def _sides(
    asked: _Asked, before: Callable[[_Asked], Scores | None], after: Callable[[_Asked], Scores]
) -> Iterator[tuple[Pair, float, float]]:
    one = before(asked)
    return zip(asked.pairs, one.tolist(), after(asked).tolist(), strict=True) if one is not None else iter(())


def differs(one: float, other: float) -> bool:
    """Whether two log-odds of one pair are further apart than rounding and batching bring about."""
    return not (abs(one - other) <= _LOG_ODDS or abs(_p(one) - _p(other)) <= _PROBABILITY)


def _p(score: float) -> float:
    return float(sigmoid(np.array([score]))[0])


def _relative(target: str, asked: Sequence[_Asked]) -> Finding | None:
    """Scores that are only shares of their request: alone, all documents get the same."""
    alone = sigmoid(np.concatenate([each.alone for each in asked]))
    together = [sigmoid(each.again) for each in asked]
    if np.ptp(alone) > 1e-4 or not any(np.ptp(each) > _PROBABILITY for each in together):
        return None
    if all(abs(each.sum() - 1) < 0.01 for each in together):
        how = "sum to 1 (a softmax over the documents)"
    elif all(each.max() > 0.9999 and each.min() < 1e-4 for each in together):
        how = "run from 0 to 1 (they are scaled to their least and largest)"
    else:
        how = "depend on one another"
    return finding("served-relative", target, how=how, alone=f"{alone[0]:.4g}")


def _exchanged(target: str, asked: Sequence[_Asked]) -> Finding | None:
    """Scores that are right but for the documents that they are given to."""
    for each in asked:
        pairs = zip(np.sort(each.alone).tolist(), np.sort(each.again).tolist(), strict=True)
        if any(differs(one, other) for one, other in pairs):
            return None
    return _changed(target, "served-exchanged", asked, lambda each: each.alone, lambda each: each.again)


def _one_token(target: str, scorer: HttpScorer, pair: Pair) -> Iterator[Finding]:
    """All answers are the same; the number of tokens read says why, where the server tells it."""
    seen, expected = None, max(1, len(pair.query.joined_text.split()) + len(pair.document.joined_text.split()))
    with suppress(QtoolError):
        seen = scorer.tokens_read(pair)
    if seen is not None and seen < min(expected, _FEW_TOKENS):
        facts = {"found": f"{seen} token" + ("" if seen == 1 else "s"), "expected": f"more than {expected}"}
        yield finding("served-one-token", target, **facts)


_FEW_TOKENS: Final = 8
"""Fewer than any official prompt has."""


def _ignored_query(target: str, scorer: HttpScorer, requests: Sequence[Request]) -> Iterator[Finding]:
    """The documents of one query are asked under another: other numbers, or the query is not read."""
    others = [each for each in requests if each.pairs[0].query.joined_text != requests[0].pairs[0].query.joined_text]
    if not others:
        return
    mine, query = requests[0].pairs, others[0].pairs[0].query
    with suppress(QtoolError):
        own, foreign = (np.array(scorer.together(pairs)) for pairs in (mine, [replace(p, query=query) for p in mine]))
        if len(mine) > 2 and np.ptp(own) > _LOG_ODDS and np.abs(own - foreign).max() < SAME:
            yield finding("scores-no-query", target, panel=f"{len(mine)} documents")


def _instructions(target: str, scorer: HttpScorer, panels: Sequence[Panel]) -> Iterator[Finding]:
    """Whether the server's prompt has a place for an instruction, where its interface has one."""
    with suppress(QtoolError):
        if scorer.heeds_instructions(panels[0].pairs[0]) is False:
            yield finding("served-ignores-instructions", target)


# Long texts. Texts of the panel are joined to a long one; if nothing that may end it changes the answer, it is cut before.

_LONG: Final = 1500
_SHORTEST: Final = 40
"""Words of the longest and of the shortest text that is tried."""


def _scored(scorer: HttpScorer) -> Callable[[Item, str], NDArray[np.float64]]:
    return lambda query, text: np.array(scorer.together([Pair(query, Item("long", (text,)))]))


def _cut(
    target: str,
    what: str,
    panels: Sequence[Panel],
    query: Item,
    ask: Callable[[Item, str], NDArray[np.float64]],
) -> Iterator[Finding]:
    texts = list(dict.fromkeys(pair.document.joined_text for panel in panels for pair in panel.pairs))
    words = [word for text in texts for word in text.split()]
    ends = [query.joined_text, *(text for text in texts[:2] if text), ""]
    if len(words) < _SHORTEST:
        return
    words = (words * (_LONG // len(words) + 1))[:_LONG]

    def is_cut(length: int, *, at_start: bool) -> bool:
        """Whether nothing before, or after, so many words changes the answer."""
        parts = [(end, *words[:length]) if at_start else (*words[:length], end) for end in ends]
        first, *others = [ask(query, " ".join(part).strip()) for part in parts]
        return all(_is_same(first, other) for other in others)

    with suppress(QtoolError):
        if is_cut(0, at_start=False):  # no text changes the answer
            return
        for at_start, where in ((False, "after"), (True, "before their last")):
            low, high = 0, _LONG
            if not is_cut(high, at_start=at_start):
                continue
            while high - low > max(_SHORTEST // 4, high // 10):
                middle = (low + high) // 2
                low, high = (low, middle) if is_cut(middle, at_start=at_start) else (middle, high)
            yield finding("served-truncated", target, where=where, words=f"{high:,}", what=what)


def _is_same(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Equal answers, which no saturated probability explains."""
    return float(np.abs(one - other).max()) < SAME and float(np.abs(one).max()) < _SATURATED


_SATURATED: Final = 15.0


# Vectors.


def _vector_faults(
    target: str, scorer: HttpScorer, panels: Sequence[tuple[Panel, PanelScores]], instruction: str | None
) -> Iterator[Finding]:
    items = _some_items(panels, instruction)
    with suppress(QtoolError):
        raw = [scorer.served_vector(item) for item, _ in items]
        lengths = np.array([np.linalg.norm(each) for each in raw])
        if np.abs(lengths - 1).max() > _LENGTH_ERROR:
            low, high = f"{lengths.min():.4g}", f"{lengths.max():.4g}"
            yield finding("served-not-normalized", target, low=low, high=high)
        yield from rounded(target, "numbers of the vectors", np.concatenate(raw), 3)
    with suppress(QtoolError):
        questions = [item for item, _ in items]
        again, once_more = (scorer.embed(questions).astype(np.float64) for _ in range(2))
        for code, before, after in (
            ("served-unsteady", again, once_more),
            ("served-changes", np.stack([first for _, first in items]), again),
        ):
            cosines = np.einsum("nd,nd->n", before, after)
            if cosines.min() < _COSINE:
                worst = int(cosines.argmin())
                facts = {"expected": "one vector", "found": f"another (cosine {cosines[worst]:.3f})"}
                count = int((cosines < _COSINE).sum())
                yield finding(
                    code, target, question=f"item {questions[worst].id!r}", count=count, total=len(items), **facts
                )
                return
    query = next((item for item, _ in items), None)
    if query is not None:
        yield from _cut(target, "vector", [panel for panel, _ in panels], query, _embedded(scorer))


def _embedded(scorer: HttpScorer) -> Callable[[Item, str], NDArray[np.float64]]:
    return lambda _, text: scorer.embed([Item("long", (text,))])[0].astype(np.float64)


_LENGTH_ERROR: Final = 0.02
"""bf16 and float16 leave the length of a unit vector within 0.01 of 1."""
_ITEMS: Final = 6


def _some_items(
    panels: Sequence[tuple[Panel, PanelScores]], instruction: str | None
) -> list[tuple[Item, NDArray[np.float64]]]:
    """A few queries and documents of each panel with their vectors in the run."""
    found: list[tuple[Item, NDArray[np.float64]]] = []
    for panel, scores in panels:
        if scores.vectors is None:
            continue
        row = 0
        for query in panel.queries[:_ITEMS]:
            item = query.item.with_instruction(query.item.instruction or instruction)
            mine, theirs = scores.rows[row]
            found += [(item, scores.vectors[mine]), (query.documents[0], scores.vectors[theirs])]
            row += len(query.documents)
    return found[: 4 * _ITEMS]


# Causes that only the reference can prove: it is asked the same questions otherwise, and gives the server's answers.


@runtime_checkable
class Pooling(Protocol):
    """A reference that can pool otherwise than it should."""

    def pooled(self, questions: Sequence[Pair | Item]) -> Mapping[str, Any]:
        """Log-odds [n] or unit vectors [n, dim] by the name of the pooling."""


_RIGHT: Final = 0.9995
"""Vectors whose median cosine with the reference's is more need no explanation."""
_EXPLAINED: Final = 0.9
"""The least median cosine with the vectors of another prompt or pooling that explains the server's."""
_PROMPTS: Final = {
    "prompt-missing-template": "the bare text",
    "prompt-no-instruction": "the official one without its instruction",
}


def reference_causes(
    case: LocatedCase, reference: Scorer, mine: Sequence[PanelScores], theirs: Sequence[PanelScores]
) -> list[Finding]:
    """The pooling, prompt or text with which the reference gives the server's answers to a few questions."""
    causes = _vector_causes if case.task is Task.EMBED else _score_causes
    return list(causes(case, reference, mine, theirs))


def _vector_causes(
    case: LocatedCase, reference: Scorer, mine: Sequence[PanelScores], theirs: Sequence[PanelScores]
) -> Iterator[Finding]:
    items = _some_items(list(zip(case.panels, theirs, strict=True)), case.query_instruction)
    expected = _some_items(list(zip(case.panels, mine, strict=True)), case.query_instruction)
    questions = [item for item, _ in items]
    if len(questions) < 2 or items[0][1].shape != expected[0][1].shape:
        return
    found = np.stack([vector for _, vector in items])
    plain = _cosine(found, np.stack([vector for _, vector in expected]))
    if plain > _RIGHT:
        return
    causes: list[tuple[float, str, str]] = []
    if isinstance(reference, Pooling):
        vectors = reference.pooled(questions)
        causes += [(_cosine(found, each), "served-pooling", name) for name, each in vectors.items()]
    if isinstance(reference, Rereader):
        for code, prompt in KnownPrompts(case.reference).wrong(questions[0]):
            read = reference.under(prompt).embed(questions)
            causes.append((_cosine(found, read), "served-other-prompt", _PROMPTS[code]))
    best, code, name = max(causes, default=(plain, "", ""))
    if best > _EXPLAINED and 1 - best < (1 - plain) / 4:
        facts = {"found": name, "plain": f"{plain:.3f}", "cosine": f"{best:.3f}"}
        yield finding(code, case.options.artefact, **facts)


def _cosine(one: Any, other: Any) -> float:
    """The median cosine of the rows of two sets of unit vectors."""
    return float(np.median(np.einsum("nd,nd->n", one, other)))


_OTHER_TEXTS: Final[Mapping[str, Callable[[Pair], Pair]]] = {
    "query and document exchanged": lambda pair: Pair(
        replace(pair.document, id=pair.query.id, instruction=pair.query.instruction, label=None),
        replace(pair.query, id=pair.document.id, instruction=None),
    ),
    "texts in lower case": lambda pair: Pair(*(_changed_text(side, str.lower) for side in (pair.query, pair.document))),
    "texts without line breaks and doubled spaces": lambda pair: Pair(
        *(_changed_text(side, lambda text: " ".join(text.split())) for side in (pair.query, pair.document))
    ),
}


def _changed_text(item: Item, change: Callable[[str], str]) -> Item:
    return replace(item, text=tuple(map(change, item.text)))


def _score_causes(
    case: LocatedCase, reference: Scorer, mine: Sequence[PanelScores], theirs: Sequence[PanelScores]
) -> Iterator[Finding]:
    known = [
        (pair, one, other)
        for panel, reference_scores, scores in zip(case.panels, mine, theirs, strict=True)
        for pair, one, other in list(zip(panel.pairs, reference_scores.scores, scores.scores, strict=True))[:_PAIRS]
    ]
    if len(known) < DOCUMENTS_AT_ONCE:
        return
    pairs, expected, found = [each[0] for each in known], *(np.array([each[n] for each in known]) for n in (1, 2))
    distance = float(np.sqrt(np.mean((expected - found) ** 2)))
    if distance < _LOG_ODDS:
        return
    changed = {name: [change(pair) for pair in pairs] for name, change in _OTHER_TEXTS.items()}
    read = {name: np.array(reference.score(other)) for name, other in changed.items() if _names(other) != _names(pairs)}
    if isinstance(reference, Pooling):
        read |= {f"the {name} pooled": np.asarray(scores) for name, scores in reference.pooled(pairs).items()}
    errors = {name: error for name, scores in read.items() if (error := fit(scores, found, expected)) is not None}
    if errors:
        best = min(errors, key=errors.__getitem__)
        facts = {"found": best, "plain": f"{distance:.3g}", "error": f"{errors[best]:.2g}"}
        yield finding("served-other-text", case.options.artefact, **facts)


_PAIRS: Final = 24


def _names(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    return [(pair.query.joined_text, pair.document.joined_text) for pair in pairs]


# Scores of another scale than the interface promises, which cannot be taken as log-odds: a few are asked as they are.


def refused_faults(
    case: LocatedCase, scorer: Scorer, reference: Scorer, error: ScaleError | DeafError
) -> list[Finding]:
    """Why the server's answers cannot be taken as scores. Raises `error` where the reason cannot be proved."""
    found: list[Finding] = []
    if isinstance(error, DeafError):
        pair = next(pair for panel in case.panels for pair in panel.pairs if pair.query.instruction)
        found = [finding("served-no-instruction", case.options.artefact, question=pair.name)]
    elif isinstance(scorer, HttpScorer):
        found = _scale_faults(case, scorer, reference)
    if not found:
        raise error
    return found


def _scale_faults(case: LocatedCase, scorer: HttpScorer, reference: Scorer) -> list[Finding]:
    """What the server's numbers are instead of probabilities; nothing where they are no known function of the reference's."""
    pairs, served = _sample(case, scorer)
    if len(served) < 4:
        return []
    target, expected = case.options.artefact, np.array(reference.score(pairs))
    facts = {"low": f"{served.min():.4g}", "high": f"{served.max():.4g}"}
    if served.min() >= 0 and served.max() <= 1:
        return list(explained(target, expected, np.array([log_odds(each) for each in served.tolist()])))
    probabilities = sigmoid(expected)
    factor, offset = line(probabilities, served)
    scales = (
        ("served-log-odds", expected),
        ("served-log-probabilities", -np.logaddexp(0.0, -expected)),
        ("served-rescaled", factor * probabilities + offset),
        ("scores-reversed", -expected),
        ("scores-reversed", -np.logaddexp(0.0, expected)),
    )
    spread = np.full(len(served), served.mean())
    errors = [(error, code) for code, scale in scales if (error := fit(scale, served, spread)) is not None]
    if not errors:
        return []
    error, code = min(errors)
    facts |= {"factor": f"{factor:.3g}", "offset": f"{offset:.3g}"}
    return [finding(code, target, error=f"{error:.2g}", **facts)]


def _sample(case: LocatedCase, scorer: HttpScorer) -> tuple[list[Pair], Scores]:
    pairs: list[Pair] = []
    served: list[float] = []
    for panel in case.panels:
        for query in panel.queries[: 2 * _QUERIES]:
            batch = query.pairs[:DOCUMENTS_AT_ONCE]
            with suppress(QtoolError):
                values = scorer.served(batch)
                kept = [place for place, value in enumerate(values) if math.isfinite(value)]
                pairs += [batch[place] for place in kept]
                served += [values[place] for place in kept]
    return pairs, np.array(served)
