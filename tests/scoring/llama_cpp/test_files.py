"""GGUF files that cannot rank, cannot be loaded or hold no numbers."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGUFValueType

from qtool.errors import ModelError
from qtool.inputs.items import Pair
from qtool.scoring.llama_cpp.model import read_model
from qtool.scoring.llama_cpp.runtime import open_llama_cpp
from qtool.storage.gguf import array, boolean, float32, string, uint32
from tests.scoring.gguf_files import changed, gguf_of, projector_of
from tests.scoring.llama_cpp.shared import (
    ALONE,
    RERANKER,
    TEXT,
)

HEADLESS = "cls.output.weight"
KEY = "qwen3vl."


@pytest.mark.parametrize(
    ("metadata", "without", "message"),
    [
        ({}, [HEADLESS], r"cannot rank: it has no cls\.output\.weight"),
        ({"tokenizer.chat_template.rerank": None}, [], r"cannot rank: tokenizer\.chat_template\.rerank is missing"),
        ({"tokenizer.chat_template.rerank": string("{query}")}, [], r"lacks \{query\} or \{document\}"),
        ({KEY + "pooling_type": None}, [], "has no qwen3vl.pooling_type; a reranker has 4, an embedder 3"),
        ({KEY + "pooling_type": uint32(1)}, [], "pooling_type = 1"),
        (
            {KEY + "classifier.output_labels": array(GGUFValueType.STRING, ["no", "yes"])},
            [],
            r"labels its scores \['no', 'yes'\]",
        ),
        ({KEY + "classifier.output_labels": None}, [], "its labels are missing"),
        ({KEY + "classifier.output_labels": None}, [HEADLESS], r"cannot rank: it has no cls\.output\.weight"),
        ({KEY + "embedding_length": uint32(128)}, [], r"shape \[2, 256\], expected \[2, 128\]"),
        ({KEY + "attention.causal": boolean(False)}, [], "attention that is not causal"),
        ({KEY + "rope.scaling.type": string("x")}, [], r"ends the whole process .*rope\.scaling\.type is 'x'"),
        ({KEY + "rope.dimension_count": uint32(8)}, [], r"rope\.dimension_count is 8, expected 64"),
        ({KEY + "rope.dimension_sections": array(GGUFValueType.INT32, [0, 0, 0, 0])}, [], "ends the whole process"),
        ({KEY + "block_count": uint32(0)}, [], "block_count is 0, expected 1 to 512"),
        ({KEY + "attention.layer_norm_rms_epsilon": float32(-1)}, [], "rms_epsilon is -1"),
        ({KEY + "embedding_length_out": uint32(4096)}, [], "embedding_length_out is 4096, expected 256"),
        ({KEY + "expert_used_count": uint32(2)}, [], "the model has no experts"),
        ({"tokenizer.ggml.eos_token_id": string("5")}, [], "refuses to load .*eos_token_id is a string"),
        ({"general.architecture": string("bert")}, [], "architecture 'bert'; expected qwen3 or qwen3vl"),
    ],
)
def test_a_file_that_cannot_rank_is_refused_with_the_reason(folder, tmp_path, metadata, without, message):
    broken = changed(gguf_of(RERANKER, "f32", folder), tmp_path / "broken.gguf", metadata, without)
    with pytest.raises(ModelError, match=message):
        open_llama_cpp(broken)


@pytest.mark.parametrize(
    ("metadata", "without"),
    [
        ({}, [HEADLESS]),
        ({KEY + "pooling_type": None}, []),
        ({KEY + "classifier.output_labels": None}, []),
        ({"tokenizer.chat_template.rerank": None}, []),
    ],
)
def test_what_a_repair_mends_is_refused_with_the_command_that_does(folder, tmp_path, metadata, without):
    from qtool.export.repair import RepairOptions, repair_gguf

    broken = changed(gguf_of(RERANKER, "f16", folder), tmp_path / "bro ken.gguf", metadata, without)
    with pytest.raises(ModelError) as refused:
        read_model(broken)
    assert f"qtool repair-gguf '{broken}' -o FIXED.gguf --task rerank" in refused.value.hint
    repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf"))
    read_model(tmp_path / "fixed.gguf")


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_a_head_in_the_wrong_order_is_refused(folder, tmp_path, outtype):
    from tests.checks.rewriting import rewrite_gguf
    from tests.checks.test_gguf import exchange_rows

    broken = Path(shutil.copy(gguf_of(RERANKER, outtype, folder), tmp_path / "broken.gguf"))
    rewrite_gguf(broken, tensors=exchange_rows)
    with pytest.raises(ModelError, match="would rank upside down") as refused:
        read_model(broken)
    assert "qtool repair-gguf" in refused.value.hint


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_head_is_read_in_whatever_type_it_is_stored(folder, outtype):
    expected = read_model(gguf_of(RERANKER, "f32", folder)).score_row
    found = read_model(gguf_of(RERANKER, outtype, folder)).score_row
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * np.abs(expected).max())


def test_a_file_that_llama_cpp_cannot_load_is_named(folder, tmp_path, capfd):
    broken = changed(gguf_of(RERANKER, "f32", folder), tmp_path / "broken.gguf", {}, ["blk.1.attn_q.weight"])
    with (
        open_llama_cpp(broken, options=ALONE) as scorer,
        pytest.raises(ModelError, match=r"cannot load .*broken\.gguf"),
    ):
        scorer.score(TEXT.pairs[:1])
    out, err = "", ""
    for _ in range(100):  # a thread of llama.cpp's own writes its log
        said = capfd.readouterr()
        out, err = out + said.out, err + said.err
        if "blk.1.attn_q.weight" in err:
            break
        time.sleep(0.1)
    assert "blk.1.attn_q.weight" in err
    assert not out


def test_weights_that_are_no_numbers_name_the_pair(folder, tmp_path):
    from qtool.storage.gguf import read_gguf

    broken = Path(shutil.copy(gguf_of(RERANKER, "f32", folder), tmp_path / "nan.gguf"))
    norm = read_gguf(broken).tensors["output_norm.weight"]
    with broken.open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.full(norm.nbytes // 4, np.nan, np.float32).tobytes())
    other = [Pair(TEXT.queries[0].item.with_instruction("Judge."), TEXT.queries[0].documents[0])]
    with open_llama_cpp(broken, options=ALONE) as scorer:
        for pairs in (TEXT.pairs[:1], other):
            with pytest.raises(ModelError, match=r"query 'q000', document 'q000-d00'.*not a finite number"):
                scorer.score(pairs)


@pytest.mark.parametrize(
    ("metadata", "without", "message"),
    [
        ({"clip.use_gelu": uint32(1)}, [], "ends the whole process .*use_gelu is a uint32"),
        ({"clip.vision.attention.head_count": uint32(3)}, [], "head_count is 3, which does not divide"),
        ({"clip.vision.spatial_merge_size": uint32(4)}, [], "spatial_merge_size is 4, expected 2"),
        ({"clip.vision.patch_size": uint32(8)}, [], "has the shape"),
        ({}, ["v.blk.0.attn_qkv.bias"], r"attn_qkv\.bias of .* is missing"),
        ({}, ["v.position_embd.weight"], r"position_embd\.weight of .* is missing"),
    ],
)
def test_a_projector_that_ends_the_process_is_refused(folder, tmp_path, metadata, without, message):
    model = gguf_of(RERANKER, "f32", folder)
    broken = changed(projector_of(RERANKER, folder), tmp_path / "mmproj-broken.gguf", metadata, without)
    with pytest.raises(ModelError, match=message):
        open_llama_cpp(model, broken)
