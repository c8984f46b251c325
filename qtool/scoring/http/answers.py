"""Servers' answers as numbers.

Rule: an answer that does not have exactly one entry for each question is an error, whatever it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qtool.errors import ModelError
from qtool.scoring.probability import log_odds

if TYPE_CHECKING:
    from numpy.typing import NDArray


def scores_of(name: str, answer: Any, count: int) -> list[float]:
    """The scores of `count` documents by index, not a number where one is null; in the shapes of vLLM, Jina and TEI."""
    found: dict[int, float] = {}
    for entry in _entries(name, answer, ("data", "results")):
        index = entry.get("index")
        if not isinstance(index, int) or not 0 <= index < count or index in found:
            raise ModelError(f"{name}: of {count} documents the server scores index {index!r}, or scores it twice.")
        found[index] = _number(name, entry.get("relevance_score", entry.get("score")))
    if len(found) != count:
        raise ModelError(f"{name}: the server gives {len(found)} scores for {count} documents.")
    return [found[index] for index in range(count)]


def probabilities_as_log_odds(name: str, scores: Sequence[float]) -> list[float]:
    """Log-odds of P(yes). Raises ModelError on what is no probability."""
    for score in scores:
        if not math.isnan(score) and not 0 <= score <= 1:
            raise ModelError(f"{name}: the server's score {score:g} is no probability, so its scale is unknown.")
    return [score if math.isnan(score) else log_odds(score) for score in scores]


def vector_of(name: str, answer: Any) -> NDArray[np.float64]:
    """The one vector of an answer in OpenAI's or TEI's shape, of length 1. Raises ModelError unless it has a direction."""
    entries = answer if isinstance(answer, list) else _entries(name, answer, ("data",))
    if len(entries) != 1:
        raise ModelError(f"{name}: the server gives {len(entries)} vectors for one item.")
    values = entries[0].get("embedding") if isinstance(entries[0], dict) else entries[0]
    if not isinstance(values, list) or not values:
        raise ModelError(f"{name}: the server's answer holds no vector.")
    vector = np.array([_number(name, value) for value in values])
    length = np.linalg.norm(vector)
    if not np.isfinite(length) or length == 0:
        raise ModelError(
            f"{name}: the server's vector has the length {length:g}.",
            "Is the server a reranker? Those have no vectors.",
        )
    return np.asarray(vector / length)


def tokens_read(answer: Any) -> int | None:
    """How many tokens the server says it has read."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _entries(name: str, answer: Any, keys: Sequence[str]) -> list[Any]:
    if isinstance(answer, dict):
        answer = next((answer[key] for key in keys if key in answer), None)
    if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
        raise ModelError(f"{name}: the server's answer has none of the known shapes.")
    return answer


def _number(name: str, value: Any) -> float:
    if value is None:
        return float("nan")  # JSON has no NaN
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{name}: the server's answer holds {value!r} where a number should be.")
    return float(value)
