"""The protocol of an engine behind an address, and its answers as numbers."""

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

# Answers as numbers. One that does not have exactly one entry for each question is an error.


_HIGHEST_ID: Final = (1 << 31) - 1


def scores_of(name: str, answer: Any, count: int) -> list[float]:
    """The scores of `count` documents by index, NaN where one is null; in the shapes of vLLM, Jina and TEI."""
    found: dict[int, float] = {}
    for entry in _entries(name, answer, ("data", "results")):
        if "index" not in entry:
            raise ModelError(f"{name}: The server's answer contains a score without an index.")
        index = entry["index"]
        if not isinstance(index, int) or not 0 <= index < count:
            raise ModelError(f"{name}: The server scored index {index!r}; expected 0 to {count - 1}.")
        if index in found:
            raise ModelError(f"{name}: The server scored index {index} twice.")
        found[index] = _number(name, entry.get("relevance_score", entry.get("score")))
    if len(found) != count:
        raise ModelError(
            f"{name}: The number of the server's scores ({len(found)}) differs from that of documents ({count})."
        )
    return [found[index] for index in range(count)]


class ScaleError(ModelError):
    """The server's scores are not what its interface promises; `HttpScorer.served` gives them as they are."""


class DeafError(UsageError):
    """The server puts no instruction into its prompt, and a question has one."""


def probabilities_as_log_odds(name: str, scores: Sequence[float]) -> list[float]:
    """Log-odds of P(yes). Raises ScaleError on a score outside 0 to 1."""
    for score in scores:
        if not math.isnan(score) and not 0 <= score <= 1:
            raise ScaleError(f"{name}: The server's score {score:g} is not a probability, so its scale is unknown.")
    return [score if math.isnan(score) else log_odds(score) for score in scores]


def vector_of(name: str, answer: Any) -> NDArray[np.float64]:
    """The one vector of an answer in OpenAI's or TEI's shape, normalised. Raises ModelError where it is zero."""
    vector = raw_vector_of(name, answer)
    with np.errstate(over="ignore", under="ignore"):
        length = np.linalg.norm(vector)
    if not np.isfinite(length) or length == 0:
        raise ModelError(
            f"{name}: The server's vector has length {length:g}, so it cannot be normalised.",
            "Check that the server runs an embedder; a reranker has no vectors.",
        )
    return np.asarray(vector / length)


def raw_vector_of(name: str, answer: Any) -> NDArray[np.float64]:
    """The one vector of an answer, as it is."""
    entries = answer if isinstance(answer, list) else _entries(name, answer, ("data",))
    if len(entries) != 1:
        raise ModelError(f"{name}: The server returned {len(entries)} vectors for one item.")
    values = entries[0].get("embedding") if isinstance(entries[0], dict) else entries[0]
    if not isinstance(values, list) or not values:
        raise ModelError(f"{name}: The server's answer contains no vector.")
    return np.array([_number(name, value) for value in values])


def tokens_read(answer: Any) -> int | None:
    """The number of prompt tokens that the server reports."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def ids_of(answer: Any) -> list[int] | None:
    """The token ids of a /tokenize answer; None where it contains none."""
    ids = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each <= _HIGHEST_ID for each in ids):
        return None
    return ids


def _entries(name: str, answer: Any, keys: Sequence[str]) -> list[Any]:
    if isinstance(answer, dict):
        answer = next((answer[key] for key in keys if key in answer), None)
    if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
        raise ModelError(f"{name}: The server's answer has an unknown format.")
    return answer


def _number(name: str, value: Any) -> float:
    if value is None:
        return float("nan")  # JSON has no NaN
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{name}: The server's answer contains {value!r}; expected a number.")
    return float(value)


# The protocol. What an engine cannot take is refused before any request, with the reason and the item.

DOCUMENTS_AT_ONCE: Final = 8
"""Few enough that answers come soon, and that little is lost when a server fails."""


class HttpEngine(Protocol):
    """The requests and answers of one engine; its methods are called from several threads."""

    def texts_only(self, task: Task) -> str:
        """Why it takes no pictures for `task`, as a sentence; empty where it takes them."""

    def check_pair(self, pair: Pair) -> None:
        """Raise UsageError where the server cannot score it."""

    def check_item(self, item: Item) -> None:
        """Raise UsageError where the server cannot embed it."""

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Find out how the server scores, before `pairs` are ranked. Raises QtoolError."""

    def ask(self, pairs: Sequence[Pair]) -> Any:
        """The server's own answer to pairs of one query, as its users get it."""

    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        """The log-odds of pairs of one query; NaN where the server computes none."""

    def rank_uncached(self, pairs: Sequence[Pair]) -> list[float] | None:
        """Likewise without the server's prefix cache; None where its interface has no way to ask so."""

    def heeds_instructions(self, pair: Pair) -> bool | None:
        """Whether an instruction changes the prompt; None where the interface has no place for one."""

    def embed(self, item: Item) -> NDArray[np.float64]:
        """The item's vector, of length 1."""

    def vector(self, item: Item) -> NDArray[np.float64]:
        """The item's vector as the server's users get it, whatever its length."""

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """What the model reads for `question`; None where the server does not report it."""


def request_name(pairs: Sequence[Pair]) -> str:
    """A request for several documents of one query in messages."""
    return pairs[0].name if len(pairs) == 1 else f"{pairs[0].name} and {len(pairs) - 1} more"


def item_name(item: Item) -> str:
    """The item in messages about one request."""
    return f"item {item.id!r}"


def picture_url(item: Item, source: ImageSource) -> str:
    """A picture of `item`, resized by the official rule, as a `data:` URL. Raises an error that names the item."""
    return f"data:image/png;base64,{png_base64(item, source)}"


def check_no_video(item: Item) -> None:
    """Raise UsageError for a video."""
    if item.video:
        raise UsageError(
            f"{item.name} contains a video; servers choose its frames by rules of their own, so it is not sent.",
            "Pass its frames as pictures, or verify the artefact's files.",
        )


def check_text_only(item: Item, reason: str) -> None:
    """Raise UsageError with the sentence `reason` for a picture or a video."""
    check_no_video(item)
    if item.image:
        raise UsageError(f"{item.name} contains a picture. {reason}", "Choose a text panel for this server.")


def check_empty_is_missing(pair: Pair, template: str) -> None:
    """Raise UsageError for an empty text, which `template` would render like a side without content."""
    for side in (pair.query, pair.document):
        if side.text and not side.joined_text and not side.image:
            raise UsageError(
                f"{pair.name}: Item {side.id!r} is an empty text; {template} cannot distinguish it from a missing one."
            )


def known_prompt(prompt: PromptSpec | None, reason: str) -> PromptSpec:
    """The prompt. Raises UsageError with the clause `reason` where it is unknown."""
    if prompt is None:
        raise UsageError(
            f"{reason}, but a server does not report its model's family.", "Pass the reference, whose prompt is used."
        )
    return prompt
