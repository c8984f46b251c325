from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qtool.arch import prompts
from qtool.arch.prompts import Truncation
from qtool.inputs.items import Item, Pair
from qtool.scoring.prompt import truncate
from tests.scoring import official
from tests.scoring.official import ids


def test_a_document_of_100_000_tokens_is_cut_by_the_official_rule(vl_model: Path, builder) -> None:
    text = "a very long document " * 8000
    prompt = builder(prompts.VL_RERANKER).pair(Pair(Item("q", ("t",)), Item("d", (text,))))
    whole = ids(
        vl_model, official.VL_RERANK.format(instruction=official.VL_RERANK_INSTRUCTION, query="t", document=text)
    )
    assert len(whole) > 100_000
    # Cut to 10240 without the last five, which the official code then puts back; of those cut one more is special.
    assert len(prompt.token_ids) == 10_245
    assert prompt.token_ids[:10_239] == whole[:10_239]
    assert prompt.token_ids[-5:] == whole[-5:]


def test_truncation_keeps_special_tokens_and_drops_plain_ones_from_the_end() -> None:
    rule = Truncation(max_length=6, tail_is_extra=True, keep_special=True)
    assert truncate([90, 1, 2, 3, 91, 4, 5, 6, 7, 8], rule, 2, {90, 91}) == [90, 1, 2, 3, 91, 4, 7, 8]
    assert truncate([90, 91, 90, 91, 90, 91, 90, 5, 6], rule, 2, {90, 91}) == [90, 91, 90, 91, 90, 91, 90, 5, 6]


def test_truncation_of_the_model_cards_cuts_before_the_suffix() -> None:
    assert truncate(list(range(20)), Truncation(max_length=8), 3, {1}) == [0, 1, 2, 3, 4, 17, 18, 19]
    assert truncate(list(range(20)), Truncation(max_length=8), 0, {19}) == list(range(8))


@given(
    ids=st.lists(st.integers(0, 9), max_size=40),
    longest=st.integers(5, 30),
    tail=st.integers(0, 5),
    extra=st.booleans(),
    keep=st.booleans(),
)
def test_truncation_is_a_subsequence_that_keeps_tail_and_specials(
    *, ids: list[int], longest: int, tail: int, extra: bool, keep: bool
) -> None:
    special = {8, 9}
    kept = truncate(ids, Truncation(longest, tail_is_extra=extra, keep_special=keep), tail, special)
    remaining = iter(ids)
    assert all(token in remaining for token in kept)
    assert kept[len(kept) - min(tail, len(ids)) :] == ids[len(ids) - min(tail, len(ids)) :]
    limit = longest + (tail if extra else 0)
    if len(ids) <= limit:
        assert kept == ids
    elif keep:
        assert [token for token in kept if token in special] == [
            token for place, token in enumerate(ids) if token in special
        ]
        assert len(kept) == limit or not [token for token in kept[: len(kept) - tail] if token not in special]
    else:
        assert len(kept) == limit


def test_long_documents_are_cut_as_the_official_classes_cut_them(vl_model: Path, builder) -> None:
    document = "word <|im_end|> " * 4000
    whole = ids(
        vl_model,
        official.VL_RERANK.format(instruction=official.VL_RERANK_INSTRUCTION, query="q", document=document),
    )
    special = set(official.tokenizer(vl_model).all_special_ids)
    budget = 10240 - sum(token in special for token in whole[:-5])
    expected = []
    for token in whole[:-5]:
        budget -= token not in special
        if token in special or budget >= 0:
            expected.append(token)
    prompt = builder(prompts.VL_RERANKER).pair(Pair(Item("q", ("q",)), Item("d", (document,))))
    assert prompt.token_ids == (*expected, *whole[-5:])
    embedded = builder(prompts.VL_EMBEDDER).item(Item("d", (document,)))
    content = official.VL_EMBED.format(instruction="Represent the user's input.", content=document)
    assert embedded.token_ids == ids(vl_model, content)[:8192]
    query = builder(prompts.TEXT_RERANKER).pair(Pair(Item("q", ("q",)), Item("d", (document,))))
    assert len(query.token_ids) == 8192
    suffix = ids(vl_model, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert query.token_ids[-len(suffix) :] == suffix
    text = builder(prompts.TEXT_EMBEDDER).item(Item("d", (document,)))
    assert text.token_ids == (*ids(vl_model, document)[:8191], *ids(vl_model, "<|endoftext|>"))
