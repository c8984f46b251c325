"""Prompts: llama.cpp's tokens are transformers'."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtool.arch.prompts import TEXT_EMBEDDER, TEXT_RERANKER, VL_EMBEDDER, VL_RERANKER, Truncation
from qtool.inputs.items import Item, Pair
from qtool.scoring.llama_cpp.runtime import LlamaCppScorer
from qtool.scoring.prompt import PromptBuilder
from qtool.scoring.tokenizer import PromptTokenizer
from tests.scoring.llama_cpp.shared import (
    ALONE,
    HOSTILE,
    RERANKER,
)


@pytest.mark.parametrize(
    "spec",
    [VL_RERANKER, TEXT_RERANKER, VL_EMBEDDER, TEXT_EMBEDDER],
    ids=["vl-rank", "text-rank", "vl-embed", "text-embed"],
)
def test_every_official_prompt_has_the_official_ids(reranker, spec):
    official = PromptTokenizer.read(RERANKER)
    for text in HOSTILE:
        prompt = spec.template.format(instruction=text, query=text, document=text, content=text)
        assert reranker.token_ids(prompt) == official.encode(prompt)


def test_prompts_are_built_and_cut_with_the_files_own_tokenizer(reranker):
    official = PromptTokenizer.read(RERANKER)
    for rule in (VL_RERANKER.truncation, Truncation(90, kept_tail=5, tail_is_extra=True, keep_special=True)):
        spec = replace(VL_RERANKER, truncation=rule)
        scorer = LlamaCppScorer(replace(reranker._model, prompt=spec), None, ALONE)
        for text in HOSTILE:
            pair = Pair(Item("q", (text,)), Item("d", (text, text)))
            assert scorer._builder.pair(pair).token_ids == PromptBuilder(official, spec).pair(pair).token_ids
        scorer.close()
    assert reranker._model.special_ids >= official.special_ids


def test_llama_cpp_does_not_normalise_so_we_do(reranker):
    assert len(reranker._contexts.token_ids("cafe\u0301")) > len(reranker.token_ids("cafe\u0301"))
    assert reranker.token_ids("cafe\u0301") == PromptTokenizer.read(RERANKER).encode("cafe\u0301")
