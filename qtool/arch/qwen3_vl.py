"""Qwen3-VL: the Qwen3 decoder with a vision tower whose deepstack feeds several layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from qtool.arch.family import Family, RopeSpec, VisionSpec
from qtool.arch.gguf_names import GgufNames
from qtool.arch.prompts import VL_EMBEDDER, VL_RERANKER
from qtool.arch.qwen3 import (
    DECODER_NAMES,
    DEFAULT_HEAD_DIM,
    DEFAULT_ROPE_THETA,
    LAYER_NAMES,
    TOKENIZER,
    decoder_tensors,
    lm_head,
    score_head,
    vllm_overrides,
)
from qtool.arch.spec import Architecture, Config, TensorSpec, dimension, layers, section

VISUAL: Final = "model.visual."


def _linear(name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (rows, columns))
    yield TensorSpec(f"{name}.bias", (rows,))


def _layer_norm(name: str, width: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (width,))
    yield TensorSpec(f"{name}.bias", (width,))


def vision_tensors(config: Config) -> Iterator[TensorSpec]:
    """The vision tower; `config` is the vision config."""
    hidden = dimension(config, "hidden_size")
    yield from _patch_embedding(config, hidden)
    for block in range(dimension(config, "depth")):
        yield from _block_tensors(config, f"{VISUAL}blocks.{block}.", hidden)
    yield from _merger_tensors(config, f"{VISUAL}merger.", norm_after_shuffle=False)
    for index in range(len(layers(config, "deepstack_visual_indexes"))):
        yield from _merger_tensors(config, f"{VISUAL}deepstack_merger_list.{index}.", norm_after_shuffle=True)


def _patch_embedding(config: Config, hidden: int) -> Iterator[TensorSpec]:
    patch = dimension(config, "patch_size", 16)
    kernel = (dimension(config, "in_channels", 3), dimension(config, "temporal_patch_size", 2), patch, patch)
    yield TensorSpec(f"{VISUAL}patch_embed.proj.weight", (hidden, *kernel))
    yield TensorSpec(f"{VISUAL}patch_embed.proj.bias", (hidden,))
    yield TensorSpec(f"{VISUAL}pos_embed.weight", (dimension(config, "num_position_embeddings"), hidden))


def _block_tensors(config: Config, block: str, hidden: int) -> Iterator[TensorSpec]:
    inner = dimension(config, "intermediate_size")
    yield from _layer_norm(f"{block}norm1", hidden)
    yield from _layer_norm(f"{block}norm2", hidden)
    yield from _linear(f"{block}attn.qkv", 3 * hidden, hidden)
    yield from _linear(f"{block}attn.proj", hidden, hidden)
    yield from _linear(f"{block}mlp.linear_fc1", inner, hidden)
    yield from _linear(f"{block}mlp.linear_fc2", hidden, inner)


def _merger_tensors(config: Config, merger: str, *, norm_after_shuffle: bool) -> Iterator[TensorSpec]:
    hidden = dimension(config, "hidden_size")
    merged = hidden * dimension(config, "spatial_merge_size", 2) ** 2
    yield from _layer_norm(f"{merger}norm", merged if norm_after_shuffle else hidden)
    yield from _linear(f"{merger}linear_fc1", merged, merged)
    yield from _linear(f"{merger}linear_fc2", dimension(config, "out_hidden_size"), merged)


def _body(config: Config) -> Iterator[TensorSpec]:
    yield from decoder_tensors(section(config, "text_config"), "model.language_model.")
    yield from vision_tensors(section(config, "vision_config"))


def _conditional(config: Config) -> Iterator[TensorSpec]:
    yield from _body(config)
    yield lm_head(config, section(config, "text_config"))


def _classifier(config: Config) -> Iterator[TensorSpec]:
    yield from _body(config)
    yield score_head(config, section(config, "text_config"))


_DECODER: Final = "model.language_model."
_RENAMED: Final = {
    _DECODER: "language_model.model.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
"""SGLang 0.5.23 renames `exclude_modules` so (models/qwen3_vl.py, hf_to_sglang_mapper) and then compares them with names that
still begin with `model.language_model.`: a decoder module excluded by its name is not found, and its load fails."""


def _kept_pattern(group: str) -> str:
    """A pattern that SGLang leaves as it is; it would also change `attn.qkv` in it."""
    return f"*.{group.removeprefix(_DECODER)}".replace(".qkv_proj", ".q*_proj")


QWEN3_VL: Final = Family(
    key="qwen3_vl",
    name="Qwen3-VL",
    gguf_architecture="qwen3vl",
    architectures=(
        Architecture(
            name="Qwen3VLForConditionalGeneration",
            family="qwen3_vl",
            is_vision=True,
            head="lm_head",
            unquantized=("lm_head", "model.language_model.embed_tokens", "model.visual*"),
            prefix="model.",
            tensors=_conditional,
            kept_pattern=_kept_pattern,
            renamed=_RENAMED,
        ),
        Architecture(
            name="Qwen3VLForSequenceClassification",
            family="qwen3_vl",
            is_vision=True,
            head="score",
            unquantized=("model.language_model.embed_tokens", "model.visual*", "score"),
            prefix="model.",
            tensors=_classifier,
            kept_pattern=_kept_pattern,
            renamed=_RENAMED,
        ),
    ),
    decoder=decoder_tensors,
    gguf_names=GgufNames(
        decoder=DECODER_NAMES,
        layer=LAYER_NAMES,
        vision={
            "patch_embed.proj": "v.patch_embd",
            "pos_embed": "v.position_embd",
            "merger.norm": "v.post_ln",
            "merger.linear_fc1": "mm.0",
            "merger.linear_fc2": "mm.2",
        },
        block={
            "norm1": "ln1",
            "norm2": "ln2",
            "attn.qkv": "attn_qkv",
            "attn.proj": "attn_out",
            "mlp.linear_fc1": "ffn_up",
            "mlp.linear_fc2": "ffn_down",
        },
        deepstack={"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"},
    ),
    reranker=VL_RERANKER,
    embedder=VL_EMBEDDER,
    rope=RopeSpec(theta=5e6, default_theta=DEFAULT_ROPE_THETA, sections=(24, 20, 20)),
    default_head_dim=DEFAULT_HEAD_DIM,
    tokenizer=TOKENIZER,
    model_class="Qwen3VLModel",
    config_class="Qwen3VLConfig",
    vision=VisionSpec(
        tensors=vision_tensors,
        prefix=VISUAL,
        patch_embedding=f"{VISUAL}patch_embed.proj.weight",
        deepstack_layers=3,
        projector_type="qwen3vl_merger",
        processor="Qwen3VLProcessor",
    ),
    sizes={(2048, 28): "2B", (2560, 36): "4B", (4096, 36): "8B"},
    vllm_overrides=vllm_overrides("Qwen3VLForSequenceClassification"),
    # Found by running llama.cpp: its graph of qwen3 applies these scales, that of qwen3vl loads and ignores them.
    # A test that is expected to fail tells when that changes.
    ignored_scales=re.compile(r"blk\.\d+\.ffn_(up|gate|down)\.scale"),
)
