"""llama.cpp as an HTTP server on the loopback interface, against the runtime in this process and the fp32 reference."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qtool import resources
from qtool.arch.spec import Task
from qtool.errors import ModelError
from qtool.inputs.items import OFFICIAL_LIMITS, Item, Pair
from qtool.inputs.panels import load_panel
from qtool.scoring.http.runtime import HttpOptions, open_http
from qtool.scoring.llama_cpp.runtime import open_llama_cpp
from qtool.scoring.llama_cpp.server import LlamaCppOptions, Pooling, start_server
from qtool.scoring.scorer import sigmoid
from qtool.scoring.transformers.runtime import open_scorer
from tests.scoring.gguf_files import gguf_of, projector_of, text_family_of

pytest.importorskip("xllamacpp")

RERANKER = resources.demo_model("qtool-demo-reranker")
EMBEDDER = resources.demo_model("qtool-demo-embedder")
ALONE = LlamaCppOptions(threads=1)
TEXT = load_panel(resources.path("calibration/panels/demo-text.jsonl")).first(2)
PICTURES = load_panel(resources.path("calibration/panels/demo-image.jsonl")).first(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@contextmanager
def serving(gguf, pooling, mmproj=None, context=1024):
    server = start_server(gguf, mmproj, pooling, context, ALONE)
    yield server.listening_address
    del server


def probabilities(scores):
    return np.array([sigmoid(score) for score in scores])


def test_texts_rank_over_http_as_in_process_and_as_the_reference(folder):
    gguf = gguf_of(RERANKER, "f32", folder)
    pairs = [
        *TEXT.pairs,
        Pair(Item("accent", ("cafe\u0301",)), Item("d", ("ﬁ", "x"))),
        Pair(Item("q", ("q",)), Item("none")),
    ]
    reported = {}
    with serving(gguf, Pooling.RANK) as url, open_http(url, HttpOptions(family="qwen3_vl")) as scorer:
        scores = scorer.score(pairs, reported.__setitem__)
        assert scorer.identity.engine.startswith("llama-server ")
        assert scorer.task is Task.RERANK
        assert scorer.prompt_seen(pairs[0]) is None
    with open_llama_cpp(gguf, options=ALONE) as inside:
        expected = inside.score(pairs)
    assert [reported[place] for place in range(len(pairs))] == scores
    assert np.abs(probabilities(scores) - probabilities(expected)).max() <= 1e-6  # measured: 0
    reference = open_scorer(RERANKER).score(pairs)
    # Measured: 7.7e-7.
    assert np.abs(probabilities(scores) - probabilities(reference)).max() <= 1e-5


def test_a_document_that_is_too_long_is_named_and_the_others_are_kept(folder):
    pairs = [
        Pair(Item("q", ("q",)), Item(f"d{place}", (text,))) for place, text in enumerate(("a", "long " * 2000, "b"))
    ]
    reported = {}
    with (
        serving(gguf_of(RERANKER, "f32", folder), Pooling.RANK) as url,
        open_http(url) as scorer,
        pytest.raises(ModelError, match=r"query 'q', document 'd1': .*exceeds the available context size"),
    ):
        scorer.score(pairs, reported.__setitem__)
    assert set(reported) == {0, 2}


def test_a_server_is_asked_for_its_task_and_says_so_when_told_another(folder):
    embedder = gguf_of(EMBEDDER, "f16", folder)
    with (
        serving(embedder, Pooling.LAST) as url,
        open_http(url, HttpOptions(task=Task.RERANK)) as scorer,
        pytest.raises(ModelError, match=r"query .*: .*does not support reranking"),
    ):
        scorer.score(TEXT.pairs[:1])


def test_texts_and_pictures_embed_over_http_as_in_process(folder):
    gguf, projector = gguf_of(EMBEDDER, "f16", folder), projector_of(EMBEDDER, folder)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    both = Item("both", ("x",), (Image.fromarray(pixels).resize((90, 70)),))
    items = [*PICTURES.queries[0].documents[:2], *TEXT.queries[0].documents[:4], both, Item("empty")]
    items.append(Item("asked", ("cafe\u0301",), instruction="Find the same"))
    with serving(gguf, Pooling.LAST, projector) as url, open_http(url, HttpOptions(family="qwen3_vl")) as scorer:
        assert scorer.task is Task.EMBED
        vectors = scorer.embed(items)
        seen = [scorer.prompt_seen(item) for item in items]
    with open_llama_cpp(gguf, projector, ALONE) as inside:
        np.testing.assert_allclose(vectors, inside.embed(items), rtol=0, atol=1e-6)  # measured: 0
        assert seen == [inside.prompt_seen(item) for item in items]
    expected = open_scorer(EMBEDDER).embed(items)
    assert (vectors * expected).sum(1).min() >= 0.999_99  # measured: 1 - 4e-7


def test_the_text_family_embeds_over_http_as_in_process(folder):
    gguf = gguf_of(text_family_of(EMBEDDER, folder, ends_texts=True), "f32", folder)
    items = [TEXT.queries[0].item, *TEXT.queries[0].documents[:2], Item("asked", ("it",), instruction="Find it")]
    with serving(gguf, Pooling.LAST) as url, open_http(url, HttpOptions(family="qwen3")) as scorer:
        vectors, seen = scorer.embed(items), scorer.prompt_seen(items[-1])
    with open_llama_cpp(gguf, options=ALONE) as inside:
        np.testing.assert_allclose(vectors, inside.embed(items), rtol=0, atol=1e-6)
        assert seen == inside.prompt_seen(items[-1])


def test_a_server_that_cuts_pictures_by_its_own_rule_is_refused(folder, monkeypatch):
    gguf, projector = gguf_of(EMBEDDER, "f16", folder), projector_of(EMBEDDER, folder)
    small = replace(OFFICIAL_LIMITS, max_pixels=OFFICIAL_LIMITS.min_pixels)
    monkeypatch.setattr("qtool.scoring.llama_cpp.server.OFFICIAL_LIMITS", small)
    picture = Item("d", image=(Image.new("RGB", (256, 256)),))
    with (
        serving(gguf, Pooling.LAST, projector) as url,
        open_http(url, HttpOptions(family="qwen3_vl")) as scorer,
        pytest.raises(ModelError, match=r"item 'd': The server read \d+ tokens; the official prompt has \d+") as caught,
    ):
        scorer.embed([picture])
    assert "--image-max-tokens 1800" in caught.value.hint
