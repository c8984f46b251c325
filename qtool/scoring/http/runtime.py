"""The HTTP runtime: a running server as a Scorer.

It is asked as its users ask it. Answers that arrived before an error are reported before the error is raised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np
from typing_extensions import Self, override

from qtool.arch.families import FAMILIES
from qtool.arch.spec import Task
from qtool.errors import ModelError, QtoolError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.inputs.pictures import decode
from qtool.progress import ignore
from qtool.scoring.http.client import HttpClient, ask_all
from qtool.scoring.http.detect import Server, ServerKind, detect_server
from qtool.scoring.http.engine import DOCUMENTS_AT_ONCE, HttpEngine, item_name, request_name, scores_of, tokens_read
from qtool.scoring.http.llama_server import LlamaServer
from qtool.scoring.http.text import Jina, Tei
from qtool.scoring.http.vllm import Vllm
from qtool.scoring.scorer import (
    LARGEST_LOG_ODDS,
    Answered,
    Identity,
    PromptSeen,
    Scorer,
    distinct_pairs,
    prompt_sha256,
    query_content,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec


@dataclass(frozen=True)
class HttpOptions:
    """How to use a server.

    `engine`, `model` and `task` override what the server reports. No server reports `family` (as `arch` names it),
    which decides the official prompt; that is needed to embed, and for empty sides. `concurrency` requests run at once,
    each for up to `timeout` seconds. A request that fails to connect or is answered with 429 or 502 to 504 is repeated
    up to `retries` times, with pauses from half a second that double.
    """

    engine: ServerKind | None = None
    model: str | None = None
    task: Task | None = None
    family: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 5


_DEFAULT: Final = HttpOptions()


def open_http(url: str, options: HttpOptions = _DEFAULT) -> HttpScorer:
    """The scorer of the server at `url`. Raises NetworkError where there is none."""
    client = HttpClient(url, options.timeout, options.retries)
    try:
        return HttpScorer(client, detect_server(client, options.engine, options.model, options.task), options)
    except QtoolError:
        client.close()
        raise


class HttpScorer(Scorer):
    """One server."""

    def __init__(self, client: HttpClient, server: Server, options: HttpOptions) -> None:
        self.server = server
        self._client = client
        self._options = options
        self._prompt = _official_prompt(server.task, options.family)
        self._engine = _engine(client, server, self._prompt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @override
    def close(self) -> None:
        """Drop the connections; the server keeps running."""
        self._client.close()

    @property
    @override
    def task(self) -> Task:
        return self.server.task

    @property
    @override
    def family(self) -> str | None:
        return self._options.family

    @property
    @override
    def identity(self) -> Identity:
        """A server does not report in which precision it computes."""
        prompt = prompt_sha256(self._prompt) if self._prompt else "the server's"
        return Identity(
            self.server.engine,
            f"{self._client.url} {self.server.model}".strip(),
            prompt,
            "the server's",
            is_pinned=False,
        )

    @property
    @override
    def query_instruction(self) -> str | None:
        return (self._prompt.query_instruction if self._prompt else "") or None

    @property
    @override
    def dimensions(self) -> None:
        """Not reported by any server."""

    @property
    def texts_only(self) -> str:
        """Why the server takes no pictures, as a sentence; empty where it takes them."""
        return self._engine.texts_only(self.task)

    @override
    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        """Raises NetworkError or ModelError with the pair's name, after `answered` was called for all earlier answers."""
        if self.task is not Task.RERANK:
            raise UsageError("The model is an embedder and cannot score pairs.", "Pass --task embed.")
        for pair in pairs:
            self._engine.check_pair(pair)
            _read_pictures(pair.query)
            _read_pictures(pair.document)
        self._client.stop.clear()  # an interrupted call leaves it set
        self._engine.prepare(pairs)
        scores: dict[int, float] = {}

        def on_score(indices: Sequence[int], score: float) -> None:
            for index in indices:
                scores[index] = score
                answered(index, score)

        ask_all(
            _batches(pairs),
            lambda batch: self._rank([pairs[equal[0]] for equal in batch]),
            on_score,
            concurrency=self._options.concurrency,
            stop=self._client.stop,
        )
        return [scores[index] for index in range(len(pairs))]

    @override
    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        """Raises NetworkError or ModelError with the item's name, after `answered` was called for all earlier answers."""
        if self.task is not Task.EMBED:
            raise UsageError("The model is a reranker and cannot embed items.", "Pass --task rerank.")
        for item in items:
            self._engine.check_item(item)
            _read_pictures(item)
        self._client.stop.clear()
        vectors: dict[int, NDArray[np.float32]] = {}

        def on_vector(index: int, vector: NDArray[np.float32]) -> None:
            vectors[index] = vector
            answered(index, vector)

        ask_all(
            [[index] for index in range(len(items))],
            lambda batch: [self._embed(items[index]) for index in batch],
            on_vector,
            concurrency=self._options.concurrency,
            stop=self._client.stop,
        )
        found = [vectors[index] for index in range(len(items))]
        odd = next((index for index, vector in enumerate(found) if len(vector) != len(found[0])), None)
        if odd is not None:
            raise ModelError(
                f"{item_name(items[odd])}: The server's vector has {len(found[odd])} dimensions; the first has "
                f"{len(found[0])}."
            )
        return np.stack(found)

    def together(self, pairs: Sequence[Pair]) -> list[float]:
        """The log-odds of `pairs` of one query, asked in one request. Raises QtoolError."""
        return self._engine.rank(pairs)

    def uncached(self, pairs: Sequence[Pair]) -> list[float] | None:
        """Likewise without the server's prefix cache; None where its interface has no way to ask so."""
        return self._engine.rank_uncached(pairs)

    def heeds_instructions(self, pair: Pair) -> bool | None:
        """Whether an instruction changes the prompt; None where the interface has no place for one."""
        return self._engine.heeds_instructions(pair)

    def served(self, pairs: Sequence[Pair]) -> list[float]:
        """What the server's users get for `pairs` of one query, whatever its scale. Raises QtoolError."""
        return scores_of(request_name(pairs), self._engine.ask(pairs), len(pairs))

    def tokens_read(self, pair: Pair) -> int | None:
        """How many tokens the server says it read of a pair; None where it does not say. Raises QtoolError."""
        return tokens_read(self._engine.ask([pair]))

    def served_vector(self, item: Item) -> NDArray[np.float64]:
        """The vector that the server's users get, whatever its length. Raises QtoolError."""
        return self._engine.vector(item)

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        return self._engine.prompt_seen(question)

    def _rank(self, pairs: Sequence[Pair]) -> list[float | QtoolError]:
        """A score or an error for each; if a request for several documents fails, each is sent by itself."""
        try:
            found = self._engine.rank(pairs)
        except ModelError as error:
            if len(pairs) == 1:
                return [error]
            return [answer for pair in pairs for answer in self._rank([pair])]
        except QtoolError as error:
            return [error] * len(pairs)
        return [_finite(pair, score) for pair, score in zip(pairs, found, strict=True)]

    def _embed(self, item: Item) -> NDArray[np.float32] | QtoolError:
        try:
            return self._engine.embed(item).astype(np.float32)
        except QtoolError as error:
            return error


def _read_pictures(item: Item) -> None:
    """Decode pictures in memory before threads start: pillow cannot decode one in several. Errors name the item."""
    try:
        for source in item.image:
            if not isinstance(source, str):
                decode(source)
    except UsageError as error:
        raise UsageError(f"{item.name}: {error.message}", error.hint) from error


def _official_prompt(task: Task, family: str | None) -> PromptSpec | None:
    if family is None:
        return None
    if family not in FAMILIES:
        raise UsageError(f"Unknown family {family!r}.", f"Choose one of {', '.join(FAMILIES)}.")
    return FAMILIES[family].prompt(task)


def _engine(client: HttpClient, server: Server, prompt: PromptSpec | None) -> HttpEngine:
    if server.kind is ServerKind.LLAMA_SERVER:
        return LlamaServer(client, server.media_marker, prompt)
    engines: dict[ServerKind, type[Vllm | Jina]] = {ServerKind.VLLM: Vllm, ServerKind.TEI: Tei, ServerKind.JINA: Jina}
    return engines[server.kind](client, server.model, prompt)


def _batches(pairs: Sequence[Pair]) -> list[list[list[int]]]:
    """Requests, each for some documents of one query; a document is given as the indices of all pairs equal to it."""
    batches = []
    for _, group in groupby(distinct_pairs(pairs), lambda equal: query_content(pairs[equal[0]].query)):
        documents = list(group)
        batches += [
            documents[start : start + DOCUMENTS_AT_ONCE] for start in range(0, len(documents), DOCUMENTS_AT_ONCE)
        ]
    return batches


def _finite(pair: Pair, score: float) -> float | ModelError:
    if math.isfinite(score) and abs(score) <= LARGEST_LOG_ODDS:
        return score
    return ModelError(f"{pair.name}: The server's score is not a finite number.", "Check its weights and its kernels.")
