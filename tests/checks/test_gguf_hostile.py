"""Nonsense in a GGUF file is survived, and what is not a model of the family is left alone."""

from __future__ import annotations

import pytest
from gguf.constants import GGUFValueType

from qtool.checks.findings import Severity
from qtool.checks.inspect import inspect
from qtool.errors import ModelError
from qtool.storage.gguf import Value, array, float32, string, uint32
from tests.checks.rewriting import TOKENIZER, codes, put, rewrite_gguf


def test_a_field_of_the_wrong_type_counts_as_missing(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=put("qwen3vl.pooling_type", string("rank")))
    assert codes(inspect(str(folder))) == ["gguf-refused", "gguf-no-pooling"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen3vl.block_count", uint32((1 << 32) - 1)),
        ("qwen3vl.embedding_length", Value(GGUFValueType.INT32, -1)),
        ("qwen3vl.attention.head_count_kv", Value(GGUFValueType.INT32, -5)),
        ("qwen3vl.rope.freq_base", string("high")),
        ("qwen3vl.rope.freq_base", float32(float("nan"))),
        ("qwen3vl.rope.dimension_sections", array(GGUFValueType.STRING, ["a"])),
        (f"{TOKENIZER}tokens", uint32(7)),
        (f"{TOKENIZER}token_type", array(GGUFValueType.INT32, [])),
        (f"{TOKENIZER}eos_token_id", Value(GGUFValueType.INT32, -1)),
        ("general.file_type", string("x")),
        ("general.architecture", uint32(1)),
    ],
)
def test_nonsense_in_a_field_is_survived(key, value, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=put(key, value))
    inspect(str(folder)).to_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip.vision.block_count", uint32((1 << 32) - 1)),
        ("clip.vision.patch_size", Value(GGUFValueType.INT32, -1)),
        ("clip.vision.spatial_merge_size", Value(GGUFValueType.INT32, -1)),
        ("clip.vision.image_size", uint32(1)),
        ("clip.projector_type", uint32(1)),
    ],
)
def test_nonsense_in_a_projector_is_survived(key, value, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "mmproj.gguf", fields=put(key, value))
    inspect(str(folder)).to_dict()


def test_a_fused_attention_is_the_same_model(copy_of):
    folder = copy_of("text-reranker-gguf")

    def fuse(tensors):
        parts = [tensors.pop(f"blk.0.attn_{letter}.weight") for letter in "qkv"]
        rows = sum(part.output.shape[0] for part in parts)
        fused = parts[0].changed(gguf_name="blk.0.attn_qkv.weight", shape=(rows, parts[0].output.shape[1]))
        tensors["blk.0.attn_qkv.weight"] = fused

    rewrite_gguf(folder / "model.gguf", tensors=fuse)
    assert codes(inspect(str(folder))) == []


def test_adapters_and_other_kinds_of_files_are_named_and_left_alone(copy_of):
    folder = copy_of("text-reranker-gguf")

    def low_rank(tensors):
        first = tensors.pop("blk.0.attn_q.weight")
        tensors.clear()
        tensors["blk.0.attn_q.weight.lora_a"] = first.changed(gguf_name="blk.0.attn_q.weight.lora_a")

    rewrite_gguf(folder / "model.gguf", fields=put("general.type", string("adapter")), tensors=low_rank)
    report = inspect(str(folder / "model.gguf"))
    assert codes(report) == ["gguf-foreign"]
    assert report.findings[0].severity is Severity.NOTE
    assert "a GGUF adapter of the architecture qwen3" in report.findings[0].sentence


def test_a_corrupt_header_is_an_error(copy_of):
    path = copy_of("text-reranker-gguf") / "model.gguf"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.gguf"):
        inspect(str(path))
