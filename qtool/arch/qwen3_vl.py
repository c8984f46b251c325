"""Qwen3-VL: the Qwen3 decoder with a vision tower whose deepstack feeds several layers."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.arch.qwen3 import decoder_tensors, lm_head, score_head
from qtool.arch.spec import Architecture, Config, TensorSpec, dimension, section

VISUAL = "model.visual."


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
    for index in range(len(config.get("deepstack_visual_indexes", ()))):
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


CONDITIONAL_GENERATION = Architecture(
    "Qwen3VLForConditionalGeneration", "qwen3_vl", is_vision=True, head="lm_head",
    unquantized=("lm_head", "model.language_model.embed_tokens", "model.visual*"), prefix="model.", tensors=_conditional,
)  # fmt: skip
SEQUENCE_CLASSIFICATION = Architecture(
    "Qwen3VLForSequenceClassification", "qwen3_vl", is_vision=True, head="score",
    unquantized=("model.language_model.embed_tokens", "model.visual*", "score"), prefix="model.", tensors=_classifier,
)  # fmt: skip
