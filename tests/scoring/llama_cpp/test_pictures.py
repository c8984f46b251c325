"""Pictures, read through the projector, against the fp32 reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.activations import GELUTanh
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed as PatchEmbedding

from qtool.arch.prompts import VL_RERANKER, Truncation
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair, Video
from qtool.scoring.llama_cpp.runtime import LlamaCppScorer, open_llama_cpp
from qtool.scoring.transformers.runtime import open_scorer
from qtool.storage.gguf import uint32
from tests.scoring.gguf_files import changed, gguf_of, projector_of, text_family_of
from tests.scoring.llama_cpp.shared import (
    ALONE,
    EMBEDDER,
    MIXED,
    PICTURES,
    RERANKER,
    TEXT,
    largest,
    smooth,
)


def test_pictures_score_as_the_reference(reranker, reference):
    drawn = [smooth(1, 20, 20), smooth(2, 740, 740), smooth(3, 97, 45, "RGBA"), smooth(4, 40, 400)]
    both = Item("q", ("which ball?",), (smooth(5, 200, 150), smooth(6, 64, 64)), instruction="Compare.")
    pairs = [
        *PICTURES.first(1).pairs,
        *MIXED.first(1).pairs,
        *(Pair(both, Item(f"d{n}", ("a caption é \n",), (image,))) for n, image in enumerate(drawn)),
        Pair(both, Item("words", ("a red ball",))),
    ]
    # Measured: 9e-4 on these; on the whole picture panel 5.7e-3 for one pair, 3.4e-3 for the next, 1.9e-4 on average.
    # The scorer itself checks for each pair that as many tokens were read as the official prompt has.
    np.testing.assert_allclose(reranker.score(pairs), reference.score(pairs), rtol=0, atol=5e-3)


def sixteen_bits(values):
    return values.half().float()


def test_what_pictures_differ_by_is_ggmls_rounding(reranker, reference, monkeypatch):
    """ggml multiplies patches as f16, looks GELU up in a table of f16, and has the tanh form in the mergers as well."""

    def table(_module, values):
        rounded = sixteen_bits(torch.nn.functional.gelu(sixteen_bits(values), approximate="tanh"))
        return torch.where(values >= 10, values, torch.where(values <= -10, 0, rounded))

    query = next(query for query in PICTURES.queries if query.item.id == "q073")
    pairs = query.pairs[-4:]  # the worst of the panel among them
    found, exact = np.array(reranker.score(pairs)), np.array(reference.score(pairs))
    patched = PatchEmbedding.forward
    monkeypatch.setattr(PatchEmbedding, "forward", lambda module, pixels: patched(module, sixteen_bits(pixels)))
    monkeypatch.setattr(GELUTanh, "forward", table)
    monkeypatch.setattr(torch.nn.GELU, "forward", table)
    rounded = np.array(reference.score(pairs))
    assert largest(found - exact) == pytest.approx(5.7e-3, abs=3e-4)
    assert largest(found - rounded) <= 2e-4  # measured: 4e-5, and 7e-5 on 40 of the panel's pairs


def test_vectors_and_their_beginnings_point_where_the_references_do(folder):
    items = [
        *PICTURES.queries[0].documents[:8],
        *TEXT.queries[0].documents[:6],
        *(query.item for query in TEXT.queries[:4]),
    ]
    items += [
        Item("asked", ("a cafe\u0301",), instruction="Find the same"),
        Item("empty"),
        Item("both", ("x",), (smooth(7, 90, 70),)),
    ]
    expected = open_scorer(EMBEDDER).embed(items)
    with open_llama_cpp(gguf_of(EMBEDDER, "f16", folder), projector_of(EMBEDDER, folder), ALONE) as scorer:
        vectors = scorer.embed(items)
        assert scorer.query_instruction is None
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for width in (256, 128, 64, 32):
        mine, theirs = vectors[:, :width].astype(float), expected[:, :width].astype(float)
        cosine = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosine.min() >= 0.999_99  # measured: 1 - 4e-7


def test_a_prompt_with_pictures_that_would_be_cut_is_refused(reranker, folder):
    spec = replace(VL_RERANKER, truncation=Truncation(100, kept_tail=5, tail_is_extra=True, keep_special=True))
    model = replace(reranker._model, prompt=spec)
    long = Pair(Item("q", ("word " * 60,)), Item("d", image=(smooth(1, 64, 64),)))
    with (
        LlamaCppScorer(model, projector_of(RERANKER, folder), ALONE) as scorer,
        pytest.raises(
            ModelError, match=r"query 'q', document 'd': llama\.cpp read \d{3} tokens; the official prompt has 105"
        ),
    ):
        scorer.score([long])


def test_pictures_need_a_projector_and_videos_are_refused(folder):
    with open_llama_cpp(gguf_of(RERANKER, "f32", folder), options=ALONE) as scorer:
        with pytest.raises(UsageError, match=r"document 'd' contains a picture.*projector"):
            scorer.score([Pair(Item("q", ("a",)), Item("d", image=(smooth(1, 64, 64),)))])
        with pytest.raises(UsageError, match=r"Item 'd' contains a video, which llama\.cpp cannot read"):
            scorer.score([Pair(Item("q", ("a",)), Item("d", video=(Video("film.mp4"),)))])
        with pytest.raises(UsageError, match="a reranker and cannot embed"):
            scorer.embed([])
    embedder = open_llama_cpp(gguf_of(EMBEDDER, "f16", folder), options=ALONE)
    with pytest.raises(UsageError, match="embedder and cannot score"):
        embedder.score([])


def test_projectors_of_other_models_are_refused_where_a_file_tells(folder, tmp_path):
    model, projector = gguf_of(RERANKER, "f32", folder), projector_of(RERANKER, folder)
    with pytest.raises(ModelError, match="is no projector: its architecture is 'qwen3vl'"):
        open_llama_cpp(model, model)
    wide = changed(projector, tmp_path / "wide.gguf", {"clip.vision.projection_dim": uint32(512)})
    with pytest.raises(ModelError, match=r"vectors of 512 from 2 deepstack layers.*reads 256 from 2"):
        open_llama_cpp(model, wide)
    text = gguf_of(text_family_of(RERANKER, tmp_path), "f32", tmp_path)
    with pytest.raises(ModelError, match="reads text only and takes no projector"):
        open_llama_cpp(text, projector)
