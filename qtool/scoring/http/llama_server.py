"""llama-server over HTTP: /v1/rerank for pairs of texts, /v1/embeddings for items.

The requests are those of the llama.cpp runtime in this process (normalised texts, official prompts as token ids,
pictures on the official grid), so that both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from typing_extensions import override

from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.http.engine import (
    HttpEngine,
    check_no_video,
    check_text_only,
    ids_of,
    known_prompt,
    probabilities_as_log_odds,
    raw_vector_of,
    request_name,
    scores_of,
    tokens_read,
    vector_of,
)
from qtool.scoring.llama_cpp.model import DOCUMENT
from qtool.scoring.llama_cpp.prompts import TextPrompt, TextPromptBuilder, normalized, request_of, side_text
from qtool.scoring.scorer import PromptSeen
from qtool.scoring.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec
    from qtool.scoring.http.client import HttpClient

_TEXTS_ONLY: Final = "llama-server's /v1/rerank takes texts only, and would score a picture's placeholder as text."
_NO_MARKER: Final = "The server takes no pictures: its /props have no media_marker."


class LlamaServer(HttpEngine):
    """llama.cpp's server."""

    def __init__(self, client: HttpClient, media_marker: str, prompt: PromptSpec | None) -> None:
        self._client = client
        self._marker = media_marker
        self._prompt = prompt
        self._building = Lock()

    @override
    def texts_only(self, task: Task) -> str:
        if task is Task.RERANK:
            return _TEXTS_ONLY
        return "" if self._marker else _NO_MARKER

    @override
    def check_pair(self, pair: Pair) -> None:
        for side in (pair.query, pair.document):
            check_text_only(side, _TEXTS_ONLY)
            self._text(side)
        baked = self._prompt.default_instruction if self._prompt else None
        if pair.query.instruction not in (None, "", baked):
            raise UsageError(
                f"{pair.name}: llama-server ranks by the instruction in its GGUF file and takes no other.",
                "Put the instruction into the file with `qtool convert-gguf --instruction`, or verify the file itself.",
            )
        if DOCUMENT in pair.query.joined_text:
            raise UsageError(
                f"{pair.name}: The query contains {DOCUMENT}, which llama.cpp would replace by the document."
            )

    @override
    def check_item(self, item: Item) -> None:
        check_no_video(item)
        known_prompt(self._prompt, "The prompt of an item depends on the model")
        if item.image and not self._marker:
            raise UsageError(f"{item.name} contains a picture. {_NO_MARKER}")

    @override
    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Nothing to find out."""

    @override
    def ask(self, pairs: Sequence[Pair]) -> Any:
        documents = [self._text(pair.document) for pair in pairs]
        body = {"query": self._text(pairs[0].query), "documents": documents}
        return self._client.post(request_name(pairs), "/v1/rerank", body)

    @override
    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        name = request_name(pairs)
        return probabilities_as_log_odds(name, scores_of(name, self.ask(pairs), len(pairs)))

    @override
    def vector(self, item: Item) -> NDArray[np.float64]:
        """Asked without `embd_normalize`, as users ask."""
        prompt = self._official(item)
        body = {"input": request_of(prompt, [item], self._marker)}
        return raw_vector_of(prompt.name, self._client.post(prompt.name, "/v1/embeddings", body))

    @override
    def rank_uncached(self, pairs: Sequence[Pair]) -> None:
        """There is no way to ask so."""

    @override
    def heeds_instructions(self, pair: Pair) -> None:
        """There is no place for one."""

    @override
    def embed(self, item: Item) -> NDArray[np.float64]:
        prompt = self._official(item)
        body = {"input": request_of(prompt, [item], self._marker), "embd_normalize": -1}
        answer = self._client.post(prompt.name, "/v1/embeddings", body)
        read = tokens_read(answer)
        if read is not None and read != len(prompt.token_ids):
            raise ModelError(
                f"{prompt.name}: The server read {read:,} tokens; the official prompt has {len(prompt.token_ids):,}.",
                "Start the server with --image-min-tokens 4 --image-max-tokens 1800, as `qtool serve-command` shows.",
            )
        return vector_of(prompt.name, answer)

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """What is sent for an item; None for a pair, since the template in /props is not the one that it ranks with."""
        if isinstance(question, Pair):
            return None
        prompt = self._official(question)
        return PromptSeen(prompt.token_ids, tuple(picture.grid_thw for picture in prompt.pictures))

    def _text(self, side: Item) -> str:
        if side.text:
            return normalized(side.joined_text)
        return side_text(
            side, known_prompt(self._prompt, f"{side.name} is empty, which model families write differently")
        )

    def _official(self, item: Item) -> TextPrompt:
        with self._building:  # the builder's cache of pictures is not safe across threads
            return self._builder.item(item)

    @cached_property
    def _builder(self) -> TextPromptBuilder:
        tokenizer: Any = _ServerTokenizer(self._client)
        prompt = known_prompt(self._prompt, "The prompt of an item depends on the model")
        # Special ids matter to rerankers only: no embedder's truncation keeps them.
        return TextPromptBuilder(PromptTokenizer(tokenizer, frozenset()), prompt)


class _Encoding(NamedTuple):
    ids: list[int]


class _ServerTokenizer:
    """The server's tokenizer with the methods of `tokenizers.Tokenizer` that prompts need."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:  # noqa: FBT001, FBT002 - tokenizers' own
        body = {"content": normalized(text), "add_special": add_special_tokens, "parse_special": True}
        answer = self._client.post("", "/tokenize", body)
        ids = ids_of(answer)
        if ids is None:
            raise ModelError(f"The answer of {self._client.url}/tokenize contains no tokens.")
        return _Encoding(ids)

    def token_to_id(self, token: str) -> int | None:
        ids = self.encode(token, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else None

    def no_padding(self) -> None:
        """The server pads nothing."""

    def no_truncation(self) -> None:
        """The server truncates nothing."""
