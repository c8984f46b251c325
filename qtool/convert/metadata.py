"""The metadata of a language model's GGUF file, the tokenizer's excepted.

Rule: keys, types and values are those of llama.cpp's own converter; what config.json says and a GGUF file cannot say is
an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf.constants import GGML_QUANT_VERSION, PoolingType
from gguf.utility import size_label

from qtool.arch.prompts import NO, YES
from qtool.arch.qwen3 import DEFAULT_HEAD_DIM
from qtool.arch.spec import Config, Task, dimension
from qtool.errors import ModelError
from qtool.gguf_file.values import Kind, Value, array, float32, int32, string, uint32
from qtool.jsonfile import read_json

_PLAIN_ROPE: Final = ("default", None)
DEFAULT_ROPE_THETA: Final = 10_000.0  # transformers' default for both Qwen3 configs


@dataclass(frozen=True)
class Origin:
    """What a file says of where it comes from; `repository` is a page on the hub, where there is one."""

    name: str
    repository: str | None = None


def general_metadata(architecture: str, kind: str, origin: Origin, parameters: int, file_type: int) -> dict[str, Value]:
    """The `general.*` fields; `parameters` counts the values of all tensors."""
    fields = {
        "general.architecture": string(architecture),
        "general.type": string(kind),
        "general.name": string(origin.name),
        "general.size_label": string(size_label(parameters, parameters, 0, 0)),
        "general.file_type": uint32(file_type),
        "general.quantization_version": uint32(GGML_QUANT_VERSION),
    }
    return fields | ({"general.source.url": string(origin.repository)} if origin.repository else {})


_SAMPLING: Final = {
    "top_k": ("top_k", int32),
    "top_p": ("top_p", float32),
    "min_p": ("min_p", float32),
    "temperature": ("temp", float32),
    "repetition_penalty": ("penalty_repeat", float32),
}


def sampling_metadata(directory: Path) -> dict[str, Value]:
    """What generation_config.json suggests to programs that generate; no ranker needs it, upstream writes it."""
    path = directory / "generation_config.json"
    declared = read_json(path) if path.is_file() else {}
    named = {field: make(declared[key]) for key, (field, make) in _SAMPLING.items() if key in declared}
    return {f"general.sampling.{field}": value for field, value in named.items()}


def decoder_metadata(architecture: str, text: Config) -> dict[str, Value]:
    """Sizes, rotary embedding and norm of the decoder that `text`, the text config, describes."""
    if text.get("is_causal") is False:
        raise ModelError("config.json: is_causal is false; the Qwen3 rerankers and embedders attend causally.")
    head_dim = dimension(text, "head_dim", DEFAULT_HEAD_DIM)
    fields = {
        "block_count": uint32(dimension(text, "num_hidden_layers")),
        "context_length": uint32(dimension(text, "max_position_embeddings")),
        "embedding_length": uint32(dimension(text, "hidden_size")),
        "feed_forward_length": uint32(dimension(text, "intermediate_size")),
        "attention.head_count": uint32(dimension(text, "num_attention_heads")),
        "attention.head_count_kv": uint32(dimension(text, "num_key_value_heads")),
        "attention.layer_norm_rms_epsilon": float32(text.get("rms_norm_eps", 1e-6)),
        "attention.key_length": uint32(head_dim),
        "attention.value_length": uint32(head_dim),
        **dict(_rope_fields(text)),
    }
    return {f"{architecture}.{key}": value for key, value in fields.items()}


def _rope_fields(text: Config) -> Iterator[tuple[str, Value]]:
    rope: Mapping[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _PLAIN_ROPE:
        raise ModelError(f"config.json: the rotary embedding is scaled ({kind!r}); no model of the family is.")
    if "mrope_section" in rope:
        sections = [*rope["mrope_section"], 0, 0, 0, 0][:4]
        yield "rope.dimension_sections", array(Kind.INT32, sections)
    yield "rope.freq_base", float32(rope.get("rope_theta", text.get("rope_theta", DEFAULT_ROPE_THETA)))


def task_metadata(architecture: str, task: Task) -> dict[str, Value]:
    """How llama.cpp pools: the rank head's two labels for a reranker, the last token for an embedder."""
    if task is Task.EMBED:
        return {f"{architecture}.pooling_type": uint32(int(PoolingType.LAST))}
    return {
        f"{architecture}.pooling_type": uint32(int(PoolingType.RANK)),
        f"{architecture}.classifier.output_labels": array(Kind.STRING, [YES, NO]),
    }


def deepstack_metadata(architecture: str, vision: Config) -> dict[str, Value]:
    """How many of the decoder's first layers get a deepstack input."""
    return {f"{architecture}.n_deepstack_layers": uint32(len(vision.get("deepstack_visual_indexes", ())))}
