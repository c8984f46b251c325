"""llama-server over HTTP: /v1/rerank for pairs of texts, /v1/embeddings for items.

Rule: what is sent is what the runtime in this process asks of llama.cpp (normalised texts, official prompts as ids,
pictures on the official grid), so that both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.http.engine import (
    check_no_video,
    check_text_only,
    known_prompt,
    probabilities_as_log_odds,
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

_TEXTS_ONLY: Final = "llama-server's /v1/rerank takes texts, and scores a picture's place holder as one."
_NO_MARKER: Final = "the server's /props name no media_marker."


class LlamaServer:
    """See HttpEngine."""

    def __init__(self, client: HttpClient, media_marker: str, prompt: PromptSpec | None) -> None:
        self._client = client
        self._marker = media_marker
        self._prompt = prompt
        self._building = Lock()

    def texts_only(self, task: Task) -> str:
        """See HttpEngine."""
        if task is Task.RERANK:
            return _TEXTS_ONLY
        return "" if self._marker else _NO_MARKER

    def check_pair(self, pair: Pair) -> None:
        """See HttpEngine."""
        for side in (pair.query, pair.document):
            check_text_only(side, _TEXTS_ONLY)
            self._text(side)
        baked = self._prompt.default_instruction if self._prompt else None
        if pair.query.instruction not in (None, "", baked):
            raise UsageError(
                f"{pair.name}: llama-server ranks under the instruction that is baked into its file.",
                "Bake it with `qtool convert-gguf --instruction`, or verify the file itself.",
            )
        if DOCUMENT in pair.query.joined_text:
            raise UsageError(f"{pair.name}: llama.cpp puts the document in place of {DOCUMENT} in the query.")

    def check_item(self, item: Item) -> None:
        """See HttpEngine."""
        check_no_video(item)
        known_prompt(self._prompt, "An item's prompt depends on the model")
        if item.image and not self._marker:
            raise UsageError(f"{item.name} holds a picture, and {_NO_MARKER}")

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """There is nothing to find out."""

    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        """See HttpEngine."""
        name = request_name(pairs)
        documents = [self._text(pair.document) for pair in pairs]
        body = {"query": self._text(pairs[0].query), "documents": documents}
        return probabilities_as_log_odds(name, scores_of(name, self._client.ask(name, "/v1/rerank", body), len(pairs)))

    def embed(self, item: Item) -> NDArray[np.float64]:
        """See HttpEngine."""
        prompt = self._official(item)
        body = {"input": request_of(prompt, [item], self._marker), "embd_normalize": -1}
        answer = self._client.ask(prompt.name, "/v1/embeddings", body)
        read = tokens_read(answer)
        if read is not None and read != len(prompt.token_ids):
            raise ModelError(
                f"{prompt.name}: the server read {read:,} tokens, the official prompt has {len(prompt.token_ids):,}.",
                "Pictures need --image-min-tokens 4 --image-max-tokens 1800: see `qtool serve-command`.",
            )
        return vector_of(prompt.name, answer)

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """What is sent for an item; of a pair llama-server does not tell: /props holds another template than it ranks with."""
        if isinstance(question, Pair):
            return None
        prompt = self._official(question)
        return PromptSeen(prompt.token_ids, tuple(picture.grid_thw for picture in prompt.pictures))

    def _text(self, side: Item) -> str:
        if side.text:
            return normalized(side.joined_text)
        return side_text(side, known_prompt(self._prompt, f"{side.name} is empty, which models write differently"))

    def _official(self, item: Item) -> TextPrompt:
        with self._building:  # what it keeps is not made for several threads
            return self._builder.item(item)

    @cached_property
    def _builder(self) -> TextPromptBuilder:
        tokenizer: Any = _ServerTokenizer(self._client)
        prompt = known_prompt(self._prompt, "An item's prompt depends on the model")
        # Special ids matter to rerankers only: no embedder's truncation spares them.
        return TextPromptBuilder(PromptTokenizer(tokenizer, frozenset()), prompt)


class _Encoding(NamedTuple):
    ids: list[int]


class _ServerTokenizer:
    """The server's tokenizer, behind those methods of `tokenizers.Tokenizer` that prompts need."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:  # noqa: FBT001, FBT002 - theirs
        body = {"content": normalized(text), "add_special": add_special_tokens, "parse_special": True}
        answer = self._client.ask("", "/tokenize", body)
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(ids, list):
            raise ModelError(f"{self._client.url}/tokenize gives no tokens.")
        return _Encoding(ids)

    def token_to_id(self, token: str) -> int | None:
        ids = self.encode(token, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else None

    def no_padding(self) -> None:
        """There is none."""

    def no_truncation(self) -> None:
        """There is none."""
