"""What each engine behind an address can be asked, and its answers as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from qtool.errors import ModelError, UsageError
from qtool.inputs.items import ImageSource, Item, Pair
from qtool.scoring.prompt import png_base64
from qtool.scoring.scorer import log_odds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec
    from qtool.arch.spec import Task
    from qtool.scoring.scorer import PromptSeen

# Servers' answers as numbers. An answer that does not have exactly one entry for each question is an error, whatever
# it holds.


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


# What each engine behind an address can be asked, whatever its dialect. What an engine cannot take is refused before
# anything is sent, with the reason and the item.


DOCUMENTS_AT_ONCE: Final = 8
"""Few enough that answers come soon, and that not much is lost with a server that dies."""


class HttpEngine(Protocol):
    """One engine's dialect; its methods are called from several threads."""

    def texts_only(self, task: Task) -> str:
        """Why it takes no pictures for a task, as a sentence; empty where it takes them."""

    def check_pair(self, pair: Pair) -> None:
        """Raise UsageError where it cannot be asked."""

    def check_item(self, item: Item) -> None:
        """Raise UsageError where it cannot be asked."""

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Find out, before pairs are ranked, how the server answers. Raises QtoolError."""

    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        """The log-odds of pairs of one query; not a number where the server computes none."""

    def embed(self, item: Item) -> NDArray[np.float64]:
        """Its vector, of length 1."""

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """See Scorer."""


def request_name(pairs: Sequence[Pair]) -> str:
    """How messages name a request for several documents of one query."""
    return pairs[0].name if len(pairs) == 1 else f"{pairs[0].name} and {len(pairs) - 1} more"


def item_name(item: Item) -> str:
    """How messages name an item."""
    return f"item {item.id!r}"


def picture_url(item: Item, source: ImageSource) -> str:
    """A picture of `item`, resized by the official rule, as a `data:` URL. Raises an error that names the item."""
    return f"data:image/png;base64,{png_base64(item, source)}"


def check_no_video(item: Item) -> None:
    """Raise UsageError for a video."""
    if item.video:
        raise UsageError(
            f"{item.name} holds a video, which is not sent to servers: each picks frames by a rule of its own.",
            "Give its frames as pictures, or verify the artefact's files.",
        )


def check_text_only(item: Item, why: str) -> None:
    """Raise UsageError for a picture or a video."""
    check_no_video(item)
    if item.image:
        raise UsageError(f"{item.name} holds a picture: {why}", "Choose a panel of texts for this server.")


def check_empty_is_missing(pair: Pair, template: str) -> None:
    """Raise UsageError for an empty text, where `template` would write the word for a side without content."""
    for side in (pair.query, pair.document):
        if side.text and not side.joined_text and not side.image:
            raise UsageError(
                f"{pair.name}: item {side.id!r} is an empty text, which {template} cannot tell from a missing one."
            )


def known_prompt(prompt: PromptSpec | None, why: str) -> PromptSpec:
    """The prompt, or a UsageError that asks for it."""
    if prompt is None:
        raise UsageError(
            f"{why}, and a server does not say which model it runs.", "Name the reference, whose prompt it is."
        )
    return prompt
