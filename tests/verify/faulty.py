"""Servers on loopback with the scores of the demo models, and with one fault each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from qtool import resources
from qtool.arch.prompts import VL_EMBEDDER, PromptSpec
from qtool.inputs.items import Item, Pair
from qtool.scoring.scorer import sigmoid
from qtool.scoring.transformers.runtime import TransformersScorer, open_scorer
from qtool.verify.faults import sigmoid as sigmoids
from tests.scoring.servers import Reply, jina, results

Rank = Callable[[str, list[str]], Sequence[float]]
"""What a fault gives for a query and its documents."""

_lock = threading.Lock()
_known: dict[tuple[str, str], float] = {}


@cache
def model(name: str = "qtool-demo-reranker") -> TransformersScorer:
    """A demo model, loaded once."""
    return open_scorer(resources.demo_model(name))


def log_odds(query: str, documents: Sequence[str]) -> np.ndarray:
    """The demo reranker's own scores."""
    with _lock:
        new = [each for each in dict.fromkeys(documents) if (query, each) not in _known]
        pairs = [Pair(Item("q", (query,)), Item("d", (each,))) for each in new]
        if pairs:
            _known.update(zip([(query, each) for each in new], model().score(pairs), strict=True))
        return np.array([_known[query, each] for each in documents])


def right(query: str, documents: list[str]) -> np.ndarray:
    """The probability of yes."""
    return sigmoids(log_odds(query, documents))


def serving_ranks(rank: Rank, **more: Any) -> Callable[[str, Any], Any]:
    """A server with Jina's interface; `more` is added to its answers."""
    return jina(lambda query, documents: {**results(*map(float, rank(query, documents))), **more})


def warm_cache() -> Rank:
    """vllm-ascend #7145: with its prefix in the cache, a prompt is read without it."""
    seen: set[tuple[str, str]] = set()

    def rank(query: str, documents: list[str]) -> list[float]:
        scores = [
            0.1 * score - 1 if (query, each) in seen else score
            for each, score in zip(documents, log_odds(query, documents), strict=True)
        ]
        seen.update((query, each) for each in documents)
        return [sigmoid(score) for score in scores]

    return rank


def disturbed() -> Rank:
    """A request is wrong while another one is under way."""
    flying = [0]

    def rank(query: str, documents: list[str]) -> np.ndarray:
        with _lock:
            flying[0] += 1
        time.sleep(0.01)
        is_alone = flying[0] == 1
        scores = log_odds(query, documents)
        with _lock:
            flying[0] -= 1
        return sigmoids(scores + (0 if is_alone else 2))

    return rank


def softmax(query: str, documents: list[str]) -> np.ndarray:
    """A softmax over the documents of the request."""
    exponentials = np.exp(log_odds(query, documents))
    return exponentials / exponentials.sum()


def unsteady() -> Rank:
    """Another score each time."""
    random = np.random.default_rng(0)
    return lambda query, documents: sigmoids(log_odds(query, documents) + random.normal(0, 2, len(documents)))


def words(text: str, *, first: int | None = None, last: int | None = None) -> str:
    """The first or last words of a text."""
    return " ".join(text.split()[slice(first) if first else slice(-(last or 0), None)])


RANKS: dict[str, tuple[Callable[[], Rank], str]] = {
    "sigmoid twice": (lambda: lambda q, ds: sigmoids(right(q, ds)), "scores-activated-twice"),
    "softmax twice": (lambda: lambda q, ds: sigmoids(2 * right(q, ds) - 1), "scores-activated-twice"),
    "probability of no": (lambda: lambda q, ds: 1 - right(q, ds), "scores-reversed"),
    "two decimals": (lambda: lambda q, ds: np.round(right(q, ds), 2), "scores-rounded"),
    "one score": (lambda: lambda _, ds: [0.4494] * len(ds), "scores-constant"),
    "no document": (lambda: lambda q, ds: [right(q, ["red ball"])[0]] * len(ds), "scores-no-document"),
    "no query": (lambda: lambda _, ds: right("red ball", ds), "scores-no-query"),
    "log-odds": (lambda: log_odds, "served-log-odds"),
    "log-probabilities": (lambda: lambda q, ds: np.log(right(q, ds)), "served-log-probabilities"),
    "percent": (lambda: lambda q, ds: 100 * right(q, ds), "served-rescaled"),
    "softmax over the request": (lambda: softmax, "served-relative"),
    "sorted under the old indices": (lambda: lambda q, ds: np.sort(right(q, ds))[::-1], "served-exchanged"),
    "size of the request": (lambda: lambda q, ds: sigmoids(log_odds(q, ds) + 0.3 * (len(ds) - 1)), "served-batch"),
    "warm cache": (warm_cache, "served-changes"),
    "other requests": (disturbed, "served-concurrent"),
    "chance": (unsteady, "served-unsteady"),
    "end cut": (lambda: lambda q, ds: right(q, [words(each, first=100) for each in ds]), "served-truncated"),
    "sides exchanged": (lambda: lambda q, ds: [right(each, [q])[0] for each in ds], "served-other-text"),
}
"""Faults of a reranker's server, and the finding that names each."""


def noisy() -> Rank:
    """bf16, and another batch each time."""
    random = np.random.default_rng(0)
    return lambda query, documents: sigmoids(log_odds(query, documents) + random.normal(0, 0.04, len(documents)))


def damaged(query: str, documents: list[str]) -> np.ndarray:
    """Weights that are wrong: nothing that a runtime does explains it."""
    noise = [np.random.default_rng(hash_of(query + each)).normal(0, 2) for each in documents]
    return sigmoids(log_odds(query, documents) + noise)


def hash_of(text: str) -> int:
    """A number that depends on the text only."""
    return sum(index * ord(letter) for index, letter in enumerate(text, 1))


# vLLM, which is asked for log-odds and can be asked without its cache.


def vllm(
    log_odds_of: Callable[[str, list[str], str | None], Sequence[float]], *, instructed: bool = True, read: int = 300
) -> Callable[[str, Any], Any]:
    """A server of vLLM's interface; its function gets the request's `cache_salt`."""

    def score(body: Any) -> Any:
        raw = log_odds_of(body["text_1"], body["text_2"], body.get("cache_salt"))
        values = [value if body.get("use_activation") is False else sigmoid(value) for value in map(float, raw)]
        longer = len(str(body.get("chat_template_kwargs", ""))) if instructed else 0
        data = [{"index": place, "score": value} for place, value in enumerate(values)]
        return {"data": data, "usage": {"prompt_tokens": read + longer}}

    def answer(path: str, body: Any) -> Any:
        if path == "/classify":
            return Reply({}, 400)
        pages = {"/version": {"version": "0.33.0"}, "/v1/models": {"data": [{"id": "served"}]}}
        return score(body) if path == "/score" and body else pages.get(path)

    return answer


# Embedders, with OpenAI's interface.


@cache
def vectors_of(text: str, pooling: str = "") -> tuple[float, ...]:
    """The demo embedder's vector of what stands in an official prompt."""
    instruction, content = parsed(text)
    item = Item("i", (content,), instruction=instruction)
    embedder = model("qtool-demo-embedder")
    with _lock:
        found = embedder.pooled([item])[pooling] if pooling else embedder.embed([item])
    return tuple(np.asarray(found)[0].astype(float).tolist())


@cache
def vector_under(prompt: PromptSpec, content: str) -> tuple[float, ...]:
    """The demo embedder's vector of a text under another prompt than the official one."""
    with _lock:
        found = model("qtool-demo-embedder").under(prompt).embed([Item("i", (content,))])
    return tuple(np.asarray(found)[0].astype(float).tolist())


def parsed(text: str) -> tuple[str, str]:
    """Instruction and content of an official prompt."""
    before, between, after = (
        VL_EMBEDDER.template.partition("{instruction}")[0],
        *VL_EMBEDDER.template.partition("{instruction}")[2].split("{content}"),
    )
    instruction, _, rest = text.removeprefix(before).partition(between)
    return instruction, rest.removesuffix(after)


def serving_vectors(vector: Callable[[str], Sequence[float]]) -> Callable[[str, Any], Any]:
    """A server whose function gives the vector of a prompt."""

    def answer(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "some-embedder"}]}
        if path != "/v1/embeddings":
            return None
        return {"data": [{"embedding": list(vector(body["input"]))}]} if body else Reply({}, 400)

    return answer
