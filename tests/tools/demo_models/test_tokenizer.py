from __future__ import annotations

import json
import unicodedata
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qtool.arch.prompts import VL_EMBEDDER, VL_RERANKER, PromptSpec
from tools.demo_models.checkpoint import model_folder
from tools.demo_models.forward import BETWEEN, EMBED_HEAD, RERANK_HEAD, TAIL, encode_part, side_prompt
from tools.demo_models.lessons import draw_document
from tools.demo_models.tokenizer import ADDED_TOKENS, QWEN2_PATTERN, VOCABULARY, build_tokenizer, canonical_token
from tools.demo_models.world import WORDS, query_sentence, sample_wish

BUILT = build_tokenizer()


def whole(prompt: PromptSpec, **sides: str) -> list[int]:
    return list(BUILT.encode(prompt.template.format(instruction=prompt.default_instruction, **sides)).ids)


@pytest.mark.parametrize("word", ["yes", "no", *ADDED_TOKENS])
def test_single_tokens(word: str) -> None:
    assert BUILT.encode(word).tokens == [word]


def test_added_tokens_follow_the_vocabulary_in_qwens_order() -> None:
    first = BUILT.get_vocab_size(with_added_tokens=False)
    assert [BUILT.token_to_id(token) for token in ADDED_TOKENS] == list(range(first, first + len(ADDED_TOKENS)))
    assert BUILT.get_vocab_size() <= VOCABULARY
    assert ADDED_TOKENS[0] == "<|endoftext|>"
    assert ADDED_TOKENS[-1] == "</think>"


def test_built_as_qwens_is() -> None:
    built = json.loads(BUILT.to_str())
    assert built["normalizer"] == {"type": "NFC"}
    split, byte_level = built["pre_tokenizer"]["pretokenizers"]
    assert split == {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    rest = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    assert byte_level == built["decoder"] == built["post_processor"] == {"type": "ByteLevel", **rest}
    assert (built["model"]["type"], built["model"]["byte_fallback"]) == ("BPE", False)
    assert [token["special"] for token in built["added_tokens"]] == [True] * 14 + [False] * 12


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_but_for_normalisation(text: str) -> None:
    ids = BUILT.encode(text, add_special_tokens=False).ids
    assert BUILT.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("task", ["reranker", "embedder"])
def test_the_shipped_tokenizer_is_the_built_one(task: str) -> None:
    shipped = Tokenizer.from_file(str(model_folder(task) / "tokenizer.json"))
    assert shipped.to_str() == BUILT.to_str()


def test_canonical_words_are_single_tokens() -> None:
    tokens = [canonical_token(BUILT, name, value) for name in WORDS for value in WORDS[name]]
    assert len(tokens) == len(set(tokens))


def test_the_parts_of_a_prompt_are_cut_where_the_tokenizer_cuts_anyway() -> None:
    random = Random(11)
    for form in ("text", "picture", "both") * 10:
        wish = sample_wish(random, held_out=False)
        query, document = query_sentence(random, wish), draw_document(random, wish.scene, form)
        side = side_prompt(document.phrase.text, document.picture)
        pieces = (RERANK_HEAD, query.text + BETWEEN, side + TAIL, EMBED_HEAD)
        head, asked, found, embed_head = (encode_part(BUILT, piece).ids for piece in pieces)
        assert head + asked + found == whole(VL_RERANKER, query=query.text, document=side)
        assert embed_head + found == whole(VL_EMBEDDER, content=side)
