"""The HTTP runtime: a running server behind the scorer protocol.

Rule: what is scored is what the server's users get. Whatever has been answered is told before an error ends the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np

from qtool.arch.families import FAMILIES
from qtool.arch.spec import Task
from qtool.errors import ModelError, QtoolError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.inputs.pictures import read_whole
from qtool.progress import ignore
from qtool.scoring.http.client import HttpClient, ask_all
from qtool.scoring.http.detect import Server, ServerKind, detect_server
from qtool.scoring.http.engine import DOCUMENTS_AT_ONCE, HttpEngine
from qtool.scoring.http.llama_server import LlamaServer
from qtool.scoring.http.text import Jina, Tei
from qtool.scoring.http.vllm import Vllm
from qtool.scoring.scorer import Answered, Identity, PromptSeen, distinct_pairs, prompt_sha256, query_content

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from qtool.arch.prompts import PromptSpec


@dataclass(frozen=True)
class HttpOptions:
    """How to ask a server.

    `engine`, `model` and `task` override what it says of itself. `family` (as `arch` names it) no server tells; it decides
    the official prompt, which is needed to embed, and for empty sides. `concurrency` requests are under way at once; one may take `timeout` seconds;
    one that finds no connection, 429 or 502 to 504 is repeated `retries` times, with pauses from half a second that double.
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
    """Find out what answers at `url`. Raises NetworkError where nothing does."""
    client = HttpClient(url, options.timeout, options.retries)
    try:
        return HttpScorer(client, detect_server(client, options.engine, options.model, options.task), options)
    except QtoolError:
        client.close()
        raise


class HttpScorer:
    """One server behind the scorer protocol."""

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

    def close(self) -> None:
        """Drop the connections; the server goes on."""
        self._client.close()

    @property
    def task(self) -> Task:
        """See Scorer."""
        return self.server.task

    @property
    def family(self) -> str | None:
        """See Scorer."""
        return self._options.family

    @property
    def identity(self) -> Identity:
        """See Scorer. In which precision a server computes, it does not say."""
        prompt = prompt_sha256(self._prompt) if self._prompt else "the server's"
        return Identity(
            self.server.engine,
            f"{self._client.url} {self.server.model}".strip(),
            prompt,
            "the server's",
            is_pinned=False,
        )

    @property
    def query_instruction(self) -> str | None:
        """See Scorer."""
        return (self._prompt.query_instruction if self._prompt else "") or None

    @property
    def dimensions(self) -> None:
        """See Scorer. No server tells."""

    @property
    def texts_only(self) -> str:
        """Why the server takes no pictures, as a sentence; empty where it takes them."""
        return self._engine.texts_only(self.task)

    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        """See Scorer. NetworkError or ModelError name the pair; what was answered until then has been told."""
        if self.task is not Task.RERANK:
            raise UsageError("An embedder does not score pairs.", "Choose --task embed.")
        for pair in pairs:
            self._engine.check_pair(pair)
            _read_pictures(pair.query)
            _read_pictures(pair.document)
        self._client.stop.clear()  # an interrupted call leaves it set
        self._engine.prepare(pairs)
        scores: dict[int, float] = {}

        def tell(places: Sequence[int], score: float) -> None:
            for place in places:
                scores[place] = score
                answered(place, score)

        workers = self._options.concurrency
        ask_all(
            _batches(pairs),
            lambda batch: self._rank([pairs[same[0]] for same in batch]),
            tell,
            workers,
            self._client.stop,
        )
        return [scores[place] for place in range(len(pairs))]

    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        """See Scorer. NetworkError or ModelError name the item; what was answered until then has been told."""
        if self.task is not Task.EMBED:
            raise UsageError("A reranker does not embed items.", "Choose --task rerank.")
        for item in items:
            self._engine.check_item(item)
            _read_pictures(item)
        self._client.stop.clear()
        vectors: dict[int, NDArray[np.float32]] = {}

        def tell(place: int, vector: NDArray[np.float32]) -> None:
            vectors[place] = vector
            answered(place, vector)

        places = [[place] for place in range(len(items))]
        workers = self._options.concurrency
        ask_all(places, lambda batch: [self._embed(items[place]) for place in batch], tell, workers, self._client.stop)
        return np.stack([vectors[place] for place in range(len(items))])

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """See Scorer."""
        return self._engine.prompt_seen(question)

    def _rank(self, pairs: Sequence[Pair]) -> list[float | QtoolError]:
        """A score or an error for each; a document that spoils the request of several is found by asking for each."""
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
    """Decode what is in memory here, since pillow cannot decode one picture in several threads. Errors name the item."""
    try:
        for source in item.image:
            if not isinstance(source, str):
                read_whole(source)
    except UsageError as error:
        raise UsageError(f"{item.name}: {error.message}", error.hint) from error


def _official_prompt(task: Task, family: str | None) -> PromptSpec | None:
    if family is None:
        return None
    if family not in FAMILIES:
        raise UsageError(f"Unknown family {family!r}.", f"Known are {', '.join(FAMILIES)}.")
    return FAMILIES[family].prompt(task)


def _engine(client: HttpClient, server: Server, prompt: PromptSpec | None) -> HttpEngine:
    if server.kind is ServerKind.LLAMA_SERVER:
        return LlamaServer(client, server.media_marker, prompt)
    dialects: dict[ServerKind, type[Vllm | Jina]] = {ServerKind.VLLM: Vllm, ServerKind.TEI: Tei, ServerKind.JINA: Jina}
    return dialects[server.kind](client, server.model, prompt)


def _batches(pairs: Sequence[Pair]) -> list[list[list[int]]]:
    """Requests, each for some documents of one query; a document stands for the places of all pairs that equal it."""
    batches = []
    for _, group in groupby(distinct_pairs(pairs), lambda same: query_content(pairs[same[0]].query)):
        places = list(group)
        batches += [places[start : start + DOCUMENTS_AT_ONCE] for start in range(0, len(places), DOCUMENTS_AT_ONCE)]
    return batches


def _finite(pair: Pair, score: float) -> float | ModelError:
    if math.isfinite(score):
        return score
    return ModelError(
        f"{pair.name}: the server's score is not a finite number.", "Its weights or its kernels are broken."
    )
