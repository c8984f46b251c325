"""Servers that take texts: TEI, and all that speak Jina's /rerank and OpenAI's /v1/embeddings.

Rule: a server that is known to add nothing to what it is sent (TEI, every embedder) gets the official prompt; one that has
a prompt of its own for pairs gets query and document as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.http.detect import RERANK_PATHS
from qtool.scoring.http.engine import (
    check_empty_is_missing,
    check_text_only,
    item_name,
    known_prompt,
    probabilities_as_log_odds,
    request_name,
    scores_of,
    vector_of,
)
from qtool.scoring.prompt import embed_instruction

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec
    from qtool.arch.spec import Task
    from qtool.scoring.http.client import HttpClient

_TEXTS_ONLY: Final = "this server's interface takes texts."


class Jina:
    """See HttpEngine: `{"model", "query", "documents"}` to probabilities."""

    def __init__(self, client: HttpClient, model: str, prompt: PromptSpec | None) -> None:
        self._client = client
        self._model = {"model": model} if model else {}
        self._prompt = prompt

    def texts_only(self, task: Task) -> str:
        """See HttpEngine."""
        del task
        return _TEXTS_ONLY

    def check_pair(self, pair: Pair) -> None:
        """See HttpEngine."""
        check_text_only(pair.query, _TEXTS_ONLY)
        check_text_only(pair.document, _TEXTS_ONLY)
        if pair.query.instruction and not (self._prompt and pair.query.instruction == self._prompt.default_instruction):
            raise UsageError(f"{pair.name}: a server of this kind cannot be given an instruction.")
        if self._prompt and self._prompt.empty_side:
            check_empty_is_missing(pair, "a server of this kind")

    def check_item(self, item: Item) -> None:
        """See HttpEngine."""
        check_text_only(item, _TEXTS_ONLY)
        known_prompt(self._prompt, "An item's prompt depends on the model")

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """There is nothing to find out."""

    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        """See HttpEngine."""
        name, documents = request_name(pairs), [pair.document.joined_text for pair in pairs]
        body = self._model | {"query": pairs[0].query.joined_text, "documents": documents, "return_documents": False}
        answer = self._client.ask(name, RERANK_PATHS, body)
        return probabilities_as_log_odds(name, scores_of(name, answer, len(pairs)))

    def embed(self, item: Item) -> NDArray[np.float64]:
        """See HttpEngine."""
        body = self._model | {"input": self._official(item), "encoding_format": "float"}
        return vector_of(item_name(item), self._client.ask(item_name(item), "/v1/embeddings", body))

    def prompt_seen(self, question: Pair | Item) -> None:
        """It does not tell."""

    def _official(self, item: Item) -> str:
        prompt = known_prompt(self._prompt, "An item's prompt depends on the model")
        instruction = embed_instruction(item.instruction, prompt)
        template = prompt.template if instruction else prompt.bare_template
        return template.format(instruction=instruction, content=_shown(item, prompt))


class Tei(Jina):
    """See HttpEngine: TEI joins query and text without a word between, so the official prompt is cut in two for it."""

    def check_pair(self, pair: Pair) -> None:
        """See HttpEngine."""
        check_text_only(pair.query, _TEXTS_ONLY)
        check_text_only(pair.document, _TEXTS_ONLY)
        if pair.query.instruction and self._prompt is None:
            raise UsageError(f"{pair.name}: without a known prompt there is no place for an instruction.")

    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        """See HttpEngine. `raw_scores` are the log-odds."""
        name, halves = request_name(pairs), [self._halves(pair) for pair in pairs]
        body = {"query": halves[0][0], "texts": [text for _, text in halves], "raw_scores": True, "truncate": False}
        return scores_of(name, self._client.ask(name, "/rerank", body), len(pairs))

    def embed(self, item: Item) -> NDArray[np.float64]:
        """See HttpEngine."""
        body: dict[str, Any] = {"inputs": [self._official(item)], "normalize": True, "truncate": False}
        return vector_of(item_name(item), self._client.ask(item_name(item), "/embed", body))

    def _halves(self, pair: Pair) -> tuple[str, str]:
        if self._prompt is None:
            return pair.query.joined_text, pair.document.joined_text
        before, after = self._prompt.template.split("{document}")
        # A space belongs to the token of the word behind it, so it goes with the document.
        shown = before.rstrip(" ")
        instruction = pair.query.instruction or self._prompt.default_instruction
        return (
            shown.format(instruction=instruction, query=_shown(pair.query, self._prompt)),
            f"{before[len(shown) :]}{_shown(pair.document, self._prompt)}{after}",
        )


def _shown(item: Item, prompt: PromptSpec) -> str:
    """The text, an empty one too: the official prompts have another word for a side that has none."""
    return item.joined_text if item.text else prompt.empty_side
