"""Texts: llama.cpp itself against the fp32 reference; nothing here is simulated."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qtool.inputs.items import Item, Pair
from qtool.scoring.llama_cpp.runtime import open_llama_cpp
from tests.scoring.gguf_files import gguf_of
from tests.scoring.llama_cpp.shared import (
    ALONE,
    HOSTILE,
    RERANKER,
    TEXT,
    largest,
    sigmoid,
)

P_BOUNDS = {"f16": 6e-4, "bf16": 4e-3, "q8_0": 2e-2}
"""Largest measured |ΔP|: 2.2e-4, 1.3e-3 and 6.6e-3. bf16 weights are the demo model's own to the
last bit, but llama.cpp multiplies by activations of the weights' type: f16, bf16, and for Q8_0 8 bits a block."""


@pytest.fixture(scope="module")
def text_scores(reference):
    return np.array(reference.score(TEXT.pairs))


@pytest.fixture
def uncovered(tmp_path) -> Path:
    """The reranker with M-RoPE sections that leave the last of 32 frequencies without an axis.

    It follows time in transformers, and in llama.cpp a fourth axis that is always 0. The real models leave two of 64,
    whose wavelengths are millions of tokens; the demo's would be 47,000.
    """
    copy = shutil.copytree(RERANKER, tmp_path / "uncovered")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def scored_by_two(path, pairs):
    """Two scorers side by side, each with half of the pairs."""

    def score(part):
        with open_llama_cpp(path, options=ALONE) as scorer:
            return scorer.score(part)

    half = len(pairs) // 2
    with ThreadPoolExecutor(2) as pool:
        return np.concatenate(list(pool.map(score, (pairs[:half], pairs[half:]))))


def test_the_text_panel_ranks_as_the_reference(folder, text_scores):
    scores = scored_by_two(gguf_of(RERANKER, "f32", folder), TEXT.pairs)
    # Measured: 2.2e-6, and 1.1e-5 in log-odds.
    assert largest(sigmoid(scores) - sigmoid(text_scores)) <= 1e-5
    assert largest(scores - text_scores) <= 1e-4


def test_a_frequency_without_an_axis_costs_what_was_measured(uncovered, tmp_path, text_scores):
    pairs = TEXT.first(4).pairs
    scores = scored_by_two(gguf_of(uncovered, "f32", tmp_path), pairs)
    # Measured: 3.9e-5 and 4.1e-4 in log-odds on these, 1.5e-4 and 9.5e-4 on the whole panel.
    assert 2e-5 < largest(sigmoid(scores) - sigmoid(text_scores[: len(pairs)])) <= 8e-5
    assert largest(scores - text_scores[: len(pairs)]) <= 8e-4


@pytest.mark.parametrize("outtype", P_BOUNDS)
def test_smaller_types_stay_within_what_was_measured(outtype, folder, text_scores):
    pairs = TEXT.first(6).pairs
    scores = scored_by_two(gguf_of(RERANKER, outtype, folder), pairs)
    assert 0 < largest(sigmoid(scores) - sigmoid(text_scores[: len(pairs)])) <= P_BOUNDS[outtype]


def test_ranking_and_reading_agree_whatever_the_order(reranker, folder):
    pairs = [*TEXT.first(1).pairs, *TEXT.queries[2].pairs[:3], TEXT.pairs[0]]
    ranked = reranker.score(pairs)
    finished: dict[int, float] = {}
    # The context is too small to rank even one of them: all are read, in a context that grows with them.
    with open_llama_cpp(gguf_of(RERANKER, "f32", folder), options=replace(ALONE, context=32)) as reader:
        read = reader.score(pairs, finished.__setitem__)
    np.testing.assert_allclose(ranked, read, rtol=0, atol=1e-4)
    assert [finished[place] for place in range(len(pairs))] == read
    assert reranker.score(pairs[::-1])[::-1] == ranked
    assert ranked[0] == ranked[-1]
    assert reranker.score([]) == []


def test_other_instructions_are_read_and_baked_ones_ranked(reranker, reference, folder):
    other = "Judge whether both name the same colour."
    query = TEXT.queries[0]
    pairs = [
        Pair(query.item.with_instruction(asked), document)
        for asked in (other, None)
        for document in query.documents[:4]
    ]
    expected = reference.score(pairs)
    assert largest(np.subtract(expected[:4], expected[4:])) > 0.01
    np.testing.assert_allclose(reranker.score(pairs), expected, rtol=0, atol=5e-3)
    with open_llama_cpp(gguf_of(RERANKER, "f32", folder, instruction=other), options=ALONE) as scorer:
        assert scorer._model.baked_instruction == other
        np.testing.assert_allclose(scorer.score(pairs), expected, rtol=0, atol=5e-3)


def test_hostile_and_empty_sides_score_as_the_reference(reranker, reference):
    sides = [*HOSTILE, "", "the {document} itself"]
    pairs = [Pair(Item("q", (text,)), Item(f"d{n}", (text,))) for n, text in enumerate(sides)]
    pairs += [Pair(Item("none"), Item("d", ("a",))), Pair(Item("q", ("a",)), Item("none"))]
    np.testing.assert_allclose(reranker.score(pairs), reference.score(pairs), rtol=0, atol=5e-3)


def test_another_prompt_in_the_file_shows_in_its_scores(folder, text_scores):
    pairs = TEXT.first(2).pairs
    with open_llama_cpp(gguf_of(RERANKER, "f32", folder, prompt="llamacpp"), options=ALONE) as scorer:
        assert scorer._model.baked_instruction is None
        assert largest(sigmoid(scorer.score(pairs)) - sigmoid(text_scores[: len(pairs)])) > 0.05
