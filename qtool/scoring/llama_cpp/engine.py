"""Questions to llama.cpp, and its answers as numbers.

Rule: what is asked here is what a llama-server is asked over the wire.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from qtool.errors import ModelError
from qtool.scoring.llama_cpp.server import LlamaCppOptions, Pooling, start_server

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Engine:
    """One file in one context, until it is closed; prompts have less than `context` tokens."""

    def __init__(
        self, gguf: Path, mmproj: Path | None, pooling: Pooling, context: int, options: LlamaCppOptions
    ) -> None:
        self.context = context
        self._server = start_server(gguf, mmproj, pooling, context, options)

    def rank(self, name: str, query: str, documents: Sequence[str]) -> list[float]:
        """P(yes) of each document, not a number where the model computes none; what /v1/rerank answers."""
        answer = _answer(name, self._server.handle_rerank, {"query": query, "documents": list(documents)})
        found = {result["index"]: result["relevance_score"] for result in answer["results"]}
        return [_number(found[index]) for index in range(len(documents))]

    def read(self, name: str, prompt: Any) -> tuple[NDArray[np.float64], int]:
        """The last token's hidden state [hidden], and how many tokens were read; `prompt` as /v1/embeddings takes it.

        Not of a rank-pooled context, which holds a score or two: llama.cpp reads beyond them, and may crash.
        """
        answer = _answer(name, self._server.handle_embeddings, {"input": prompt, "embd_normalize": -1})
        vector = np.array([_number(value) for value in answer["data"][0]["embedding"]])
        return vector, int(answer["usage"]["prompt_tokens"])

    def token_ids(self, text: str) -> list[int]:
        """llama.cpp's ids of a text, with special tokens parsed and those added that the file asks for."""
        body = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = self._request("POST", "/tokenize", body)["tokens"]
        return ids

    @cached_property
    def media_marker(self) -> str:
        """What stands for a picture in a prompt: a word that the server drew at random, so that no text contains it."""
        return str(self._request("GET", "/props")["media_marker"])

    def close(self) -> None:
        """Free the model."""
        self._server = None

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        # The wheel has no call for these two, but its server listens on the loopback interface like any other.
        address = urlsplit(self._server.listening_address)
        connection = HTTPConnection(address.hostname or "", address.port)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Connection": "close"})
            return _checked("llama.cpp", json.loads(connection.getresponse().read()))
        finally:
            connection.close()


class Engines:
    """The contexts of one file: loaded when first asked for, and anew with more room where a prompt needs it."""

    def __init__(self, gguf: Path, mmproj: Path | None, usual: Pooling, options: LlamaCppOptions) -> None:
        self.mmproj = mmproj
        self._usual = usual
        self.options = options
        self._gguf = gguf
        self._open: dict[Pooling, Engine] = {}

    def engine(self, pooling: Pooling, tokens: int = 0) -> Engine:
        """The context for `pooling` with room for a prompt of `tokens`."""
        engine = self._open.get(pooling)
        if engine is not None and tokens < engine.context:
            return engine
        context = self.options.context
        while context <= tokens:
            context *= 2
        if engine is not None:
            self._open.pop(pooling).close()
        projector = self.mmproj if pooling is Pooling.LAST else None
        self._open[pooling] = Engine(self._gguf, projector, pooling, context, self.options)
        return self._open[pooling]

    def token_ids(self, text: str) -> list[int]:
        """See Engine; whichever context is open answers."""
        engine = next(iter(self._open.values()), None)
        return (engine or self.engine(self._usual)).token_ids(text)

    def close(self) -> None:
        """Free the model; another question would load it again."""
        while self._open:
            self._open.popitem()[1].close()


def _answer(name: str, handler: Any, body: Any) -> Any:
    try:
        answer = handler(body)
    except RuntimeError as error:
        raise ModelError(f"{name}: llama.cpp says: {error}.") from error
    return _checked(name, answer)


def _checked(name: str, answer: Any) -> Any:
    if "error" in answer:
        raise ModelError(f"{name}: llama.cpp says: {answer['error'].get('message')}.")
    return answer


def _number(value: float | None) -> float:
    return float("nan") if value is None else value  # JSON has no NaN
