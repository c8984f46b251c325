"""Servers that take texts: TEI, and all with Jina's /rerank and OpenAI's /v1/embeddings.

A server that adds nothing to what it is sent (TEI, every embedder) gets the official prompt; one that writes the prompt
of a pair itself gets query and document as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.http.detect import RERANK_PATHS
from qtool.scoring.http.engine import (
    HttpEngine,
    check_empty_is_missing,
    check_text_only,
    item_name,
    known_prompt,
    probabilities_as_log_odds,
    raw_vector_of,
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

_TEXTS_ONLY: Final = "The server's interface takes texts only."


class Jina(HttpEngine):
    """`{"model", "query", "documents"}` to probabilities."""

    def __init__(self, client: HttpClient, model: str, prompt: PromptSpec | None) -> None:
        self._client = client
        self._model = {"model": model} if model else {}
        self._prompt = prompt

    @override
    def texts_only(self, task: Task) -> str:
        del task
        return _TEXTS_ONLY

    @override
    def check_pair(self, pair: Pair) -> None:
        check_text_only(pair.query, _TEXTS_ONLY)
        check_text_only(pair.document, _TEXTS_ONLY)
        if pair.query.instruction and not (self._prompt and pair.query.instruction == self._prompt.default_instruction):
            raise UsageError(f"{pair.name}: This kind of server takes no instruction.")
        if self._prompt and self._prompt.empty_side:
            check_empty_is_missing(pair, "this kind of server")

    @override
    def check_item(self, item: Item) -> None:
        check_text_only(item, _TEXTS_ONLY)
        known_prompt(self._prompt, "The prompt of an item depends on the model")

    @override
    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Nothing to find out."""

    @override
    def ask(self, pairs: Sequence[Pair]) -> Any:
        documents = [pair.document.joined_text for pair in pairs]
        body = self._model | {"query": pairs[0].query.joined_text, "documents": documents, "return_documents": False}
        return self._client.post(request_name(pairs), RERANK_PATHS, body)

    @override
    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        name = request_name(pairs)
        return probabilities_as_log_odds(name, scores_of(name, self.ask(pairs), len(pairs)))

    @override
    def rank_uncached(self, pairs: Sequence[Pair]) -> None:
        """There is no way to ask so."""

    @override
    def heeds_instructions(self, pair: Pair) -> None:
        """There is no place for one."""

    @override
    def embed(self, item: Item) -> NDArray[np.float64]:
        return vector_of(item_name(item), self._embedding(item))

    @override
    def vector(self, item: Item) -> NDArray[np.float64]:
        return raw_vector_of(item_name(item), self._embedding(item))

    @override
    def prompt_seen(self, question: Pair | Item) -> None:
        """Not reported."""

    def _embedding(self, item: Item) -> Any:
        body = self._model | {"input": self._official(item), "encoding_format": "float"}
        return self._client.post(item_name(item), "/v1/embeddings", body)

    def _official(self, item: Item) -> str:
        prompt = known_prompt(self._prompt, "The prompt of an item depends on the model")
        instruction = embed_instruction(item.instruction, prompt)
        template = prompt.template if instruction else prompt.bare_template
        return template.format(instruction=instruction, content=_text(item, prompt))


class Tei(Jina):
    """TEI joins query and text without anything in between, so the official prompt is cut in two for it."""

    @override
    def check_pair(self, pair: Pair) -> None:
        check_text_only(pair.query, _TEXTS_ONLY)
        check_text_only(pair.document, _TEXTS_ONLY)
        if pair.query.instruction and self._prompt is None:
            raise UsageError(
                f"{pair.name}: The model's family is unknown, so its prompt has no place for an instruction."
            )

    @override
    def ask(self, pairs: Sequence[Pair]) -> Any:
        halves = [self._halves(pair) for pair in pairs]
        # `raw_scores` are the log-odds.
        body = {"query": halves[0][0], "texts": [text for _, text in halves], "raw_scores": True, "truncate": False}
        return self._client.post(request_name(pairs), "/rerank", body)

    @override
    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        return scores_of(request_name(pairs), self.ask(pairs), len(pairs))

    @override
    def _embedding(self, item: Item) -> Any:
        body: dict[str, Any] = {"inputs": [self._official(item)], "normalize": True, "truncate": False}
        return self._client.post(item_name(item), "/embed", body)

    def _halves(self, pair: Pair) -> tuple[str, str]:
        if self._prompt is None:
            return pair.query.joined_text, pair.document.joined_text
        before, after = self._prompt.template.split("{document}")
        # A space belongs to the token of the word after it, so it goes with the document.
        query_part = before.rstrip(" ")
        instruction = pair.query.instruction or self._prompt.default_instruction
        return (
            query_part.format(instruction=instruction, query=_text(pair.query, self._prompt)),
            f"{before[len(query_part) :]}{_text(pair.document, self._prompt)}{after}",
        )


def _text(item: Item, prompt: PromptSpec) -> str:
    """The text, even an empty one; the official prompts have a word of their own for a side without text."""
    return item.joined_text if item.text else prompt.empty_side
