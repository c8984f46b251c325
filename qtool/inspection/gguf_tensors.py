"""The tensors of a GGUF file against those that its own fields promise.

Rule: names and shapes come from the declared architecture, as they do for checkpoints; sizes that no file of this many
tensors can have are not even listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Final

from qtool.arch.qwen3 import decoder_tensors
from qtool.arch.spec import TensorSpec
from qtool.convert.names import OUTPUT, TOKEN_EMBEDDING, gguf_name_of
from qtool.inspection.catalogue import listed
from qtool.inspection.classes import StoredTensor
from qtool.inspection.finding import Finding
from qtool.inspection.gguf_model import GgufModel
from qtool.inspection.language import LanguageModel

Shape = tuple[int, ...]

_REQUIRED: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON: Final = "attention.layer_norm_rms_epsilon"
_MOST: Final = 1 << 16
_SCALES: Final = (".scale", ".input_scale")
_SPLIT, _FUSED = ("attn_q", "attn_k", "attn_v"), "attn_qkv"


def tensor_findings(model: LanguageModel) -> Iterator[Finding]:
    """What is missing, of another shape, or too much."""
    missing_fields = list(_missing_fields(model))
    if missing_fields:
        yield model.found("gguf-missing-field", field=listed(missing_fields))
        return
    expected = _expected(model)
    found = {name: tensor.shape for name, tensor in model.file.tensors.items()}
    known = [*expected, OUTPUT]
    missing, misshapen = compare(expected, found)
    if missing:
        yield model.found("gguf-missing-tensor", tensors=listed(missing))
    for name in misshapen[:1]:
        yield model.found("gguf-tensor-shape", tensor=name, found=list(found[name]), expected=list(expected[name]))
    unknown = [n for n in found if n not in known and not n.startswith("cls.") and not _is_scale(n, found)]
    if unknown:
        yield model.found("gguf-unknown-tensor", tensors=listed(unknown))


def _missing_fields(model: LanguageModel) -> Iterator[str]:
    for field in _REQUIRED:
        if (model.integer(field) or 0) < 1:
            yield model.key(field)
    if model.file.number(model.key(_EPSILON)) is None:
        yield model.key(_EPSILON)
    if model.head_dim < 1:
        yield model.key("attention.key_length")


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> tuple[list[str], list[str]]:
    """The names that are missing, and those of another shape."""
    missing = [name for name in expected if name not in found]
    return missing, [name for name, shape in expected.items() if name in found and found[name] != shape]


def stored_tensors(file: GgufModel) -> Iterator[StoredTensor]:
    """The tensors for the table of classes."""
    names = file.tensors
    for name, tensor in names.items():
        is_scale = _is_scale(name, names)
        yield StoredTensor(
            name, None if is_scale else tensor.type.name, 0 if is_scale else prod(tensor.shape), tensor.nbytes
        )


def _is_scale(name: str, names: Mapping[str, object]) -> bool:
    return any(name.endswith(suffix) and f"{name.removesuffix(suffix)}.weight" in names for suffix in _SCALES)


def _expected(model: LanguageModel) -> dict[str, Shape]:
    tokens = len(model.file.texts("tokenizer.ggml.tokens"))
    heads = model.integer("attention.head_count") or 0
    layers = min(model.integer("block_count") or 0, len(model.file.tensors) + 1, _MOST)
    config = {
        **{hf_field: model.integer(field) for field, hf_field in _REQUIRED.items()},
        "num_hidden_layers": layers,
        "num_key_value_heads": max(model.integer("attention.head_count_kv") or heads, 1),
        "head_dim": model.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in model.file.tensors,
        "vocab_size": tokens or _rows_of_embedding(model),
    }
    expected = dict(_named(spec) for spec in decoder_tensors(config, "model."))
    for layer in range(layers):
        if f"blk.{layer}.{_FUSED}.weight" in model.file.tensors:
            parts = [expected.pop(f"blk.{layer}.{part}.weight") for part in _SPLIT]
            expected[f"blk.{layer}.{_FUSED}.weight"] = (sum(rows for rows, _ in parts), parts[0][1])
    return expected


def _rows_of_embedding(model: LanguageModel) -> int:
    embedding = model.file.tensors.get(TOKEN_EMBEDDING)
    return embedding.shape[0] if embedding else 1


def _named(spec: TensorSpec) -> tuple[str, Shape]:
    return str(gguf_name_of(spec.hf_name)), spec.shape
