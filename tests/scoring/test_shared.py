from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.arch.spec import Task
from qtool.inputs.items import Item, Pair
from qtool.scoring.transformers.prefix import BatchLimits, SharedReader, rope_positions
from qtool.scoring.transformers.runtime import ScorerOptions, TransformersScorer, open_scorer


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SHOWN = picture(3, 128, 128)
TEXTS = ("a red ball", "a much longer document " * 9, "", "<|image_pad|> spelled out", "a red bull")
DOCUMENTS = [
    *(Item(f"t{n}", (text,)) for n, text in enumerate(TEXTS)),
    Item("p0", image=(picture(0),)),
    Item("p1", ("a caption",), (picture(1), picture(2, 64, 128))),
    Item("p2", ("another",), (picture(1), picture(4, 64, 128))),
]
QUERIES = [
    Item("q", ("which ball?",)),
    Item("shown", ("like this",), (SHOWN,)),
    Item("instructed", ("like this",), (SHOWN, picture(5)), instruction="Find the same object."),
]
# A text that spells out a picture token is refused beside real pictures.
PAIRS = [
    Pair(query, document)
    for query in QUERIES
    for document in DOCUMENTS
    if not (query.image and "<|image_pad|>" in document.joined_text)
]
TEXT_PAIRS = [Pair(QUERIES[0], document) for document in DOCUMENTS[: len(TEXTS)]]


def rerank(directory: Path, limits: BatchLimits = BatchLimits()) -> TransformersScorer:  # noqa: B008
    return open_scorer(directory, ScorerOptions(Task.RERANK, device="cpu", limits=limits))


def alone(scorer: TransformersScorer, pairs: list[Pair]) -> list[float]:
    """Each prompt in one pass by itself: what a single prompt reads is the whole of it."""
    return [scorer.score([pair])[0] for pair in pairs]


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[::-1], PAIRS[:8], PAIRS[8:15], PAIRS[::7], TEXT_PAIRS])
def test_a_shared_beginning_scores_as_whole_prompts_do(vl_model: Path, pairs: list[Pair]) -> None:
    scorer = rerank(vl_model)
    np.testing.assert_allclose(scorer.score(pairs), alone(scorer, pairs), rtol=0, atol=1e-5)


def test_a_shared_beginning_scores_as_whole_texts_do(text_model: Path) -> None:
    scorer = rerank(text_model, BatchLimits(prompts=3, window_tokens=900))
    np.testing.assert_allclose(scorer.score(TEXT_PAIRS), alone(scorer, TEXT_PAIRS), rtol=0, atol=1e-5)


def test_blank_pictures_of_as_many_patches_are_told_apart_by_their_shape(vl_model: Path) -> None:
    scorer = rerank(vl_model)
    shapes = ((128, 512), (512, 128), (256, 256))
    blank = [Item(f"{shape}", image=(Image.new("RGB", shape, "white"),)) for shape in shapes]
    pairs = [Pair(QUERIES[0], document) for document in blank]
    np.testing.assert_allclose(scorer.score(pairs), alone(scorer, pairs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [40, 190, 260])
def test_truncated_prompts_share_what_is_left_of_them(vl_model: Path, length: int) -> None:
    scorer = rerank(vl_model)
    spec = scorer._builder.spec
    scorer._builder.spec = replace(spec, truncation=replace(spec.truncation, max_length=length))
    np.testing.assert_allclose(scorer.score(PAIRS), alone(scorer, PAIRS), rtol=0, atol=1e-5)


def test_what_is_read_shrinks_and_every_pair_is_counted(vl_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = rerank(vl_model)
    windows: list[int] = []
    read = SharedReader.last_hidden
    monkeypatch.setattr(SharedReader, "last_hidden", lambda me, w: windows.append(len(w)) or read(me, w))
    answers: dict[int, float] = {}
    renamed = [Pair(pair.query, replace(pair.document, id="again", label=2.0)) for pair in PAIRS[::-1]]
    scores = scorer.score([*PAIRS, *renamed], answers.__setitem__)
    assert windows == [len(PAIRS)]
    assert [float(answers[place]) for place in range(2 * len(PAIRS))] == scores
    assert scores[: len(PAIRS)] == scores[: len(PAIRS) - 1 : -1]


def test_positions_are_those_of_transformers(vl_model: Path) -> None:
    scorer = rerank(vl_model)
    forward = scorer._reader.forward
    for pair in PAIRS:
        span = forward.span(scorer._builder.pair(pair))
        grid = torch.tensor([seen.grid_thw for seen in span.pictures]) if span.pictures else None
        ids, kinds = torch.from_numpy(span.ids)[None], torch.from_numpy(span.is_picture)[None].int()
        expected, _ = forward.base.get_rope_index(ids, kinds, image_grid_thw=grid)
        np.testing.assert_array_equal(span.positions, expected[:, 0])
    assert rope_positions(np.zeros(3, dtype=np.bool_), []).tolist() == [[0, 1, 2]] * 3
