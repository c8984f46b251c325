"""The Qwen3 decoder: Qwen3-Reranker and Qwen3-Embedding, and the language half of the VL models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qtool.arch.family import Family, RopeSpec, TokenizerSpec
from qtool.arch.gguf_names import GgufNames
from qtool.arch.prompts import NO, TEXT_EMBEDDER, TEXT_RERANKER, YES
from qtool.arch.spec import Architecture, Config, Presence, TensorSpec, dimension

DEFAULT_HEAD_DIM: Final = 128  # transformers' defaults for both configs, Qwen3's and Qwen3-VL's
DEFAULT_ROPE_THETA: Final = 10_000.0


def decoder_tensors(config: Config, prefix: str) -> Iterator[TensorSpec]:
    """Embedding, layers and final norm; `config` is the text config, `prefix` such as `model.`."""
    hidden = dimension(config, "hidden_size")
    yield TensorSpec(f"{prefix}embed_tokens.weight", (dimension(config, "vocab_size"), hidden))
    for layer in range(dimension(config, "num_hidden_layers")):
        yield from _layer_tensors(config, f"{prefix}layers.{layer}.")
    yield TensorSpec(f"{prefix}norm.weight", (hidden,))


def _layer_tensors(config: Config, layer: str) -> Iterator[TensorSpec]:
    hidden = dimension(config, "hidden_size")
    inner = dimension(config, "intermediate_size")
    yield TensorSpec(f"{layer}input_layernorm.weight", (hidden,))
    yield from _attention_tensors(config, f"{layer}self_attn.", hidden)
    yield TensorSpec(f"{layer}post_attention_layernorm.weight", (hidden,))
    for projection in ("gate_proj", "up_proj"):
        yield TensorSpec(f"{layer}mlp.{projection}.weight", (inner, hidden), f"{layer}mlp.gate_up_proj")
    yield TensorSpec(f"{layer}mlp.down_proj.weight", (hidden, inner), f"{layer}mlp.down_proj")


def _attention_tensors(config: Config, attention: str, hidden: int) -> Iterator[TensorSpec]:
    head_dim = dimension(config, "head_dim", DEFAULT_HEAD_DIM)
    query_rows = dimension(config, "num_attention_heads") * head_dim
    key_rows = dimension(config, "num_key_value_heads") * head_dim
    for letter, rows in (("q", query_rows), ("k", key_rows), ("v", key_rows)):
        yield TensorSpec(f"{attention}{letter}_proj.weight", (rows, hidden), f"{attention}qkv_proj")
    yield TensorSpec(f"{attention}o_proj.weight", (hidden, query_rows), f"{attention}o_proj")
    if config.get("attention_bias"):
        for letter, rows in (("q", query_rows), ("k", key_rows), ("v", key_rows), ("o", hidden)):
            yield TensorSpec(f"{attention}{letter}_proj.bias", (rows,))
    for letter in "qk":
        yield TensorSpec(f"{attention}{letter}_norm.weight", (head_dim,))


def lm_head(config: Config, text: Config) -> TensorSpec:
    """The vocabulary head. An untied embedder may lack it (Qwen3-VL-Embedding-8B does)."""
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    presence = Presence.DUPLICATE if tied else Presence.OPTIONAL
    return TensorSpec(
        "lm_head.weight", (dimension(text, "vocab_size"), dimension(text, "hidden_size")), presence=presence
    )


def score_head(config: Config, text: Config) -> TensorSpec:
    """The classification head of the `…ForSequenceClassification` forms: one row a label."""
    labels = config.get("id2label")
    rows = len(labels) if labels else dimension(config, "num_labels", 2)  # transformers' default
    return TensorSpec("score.weight", (rows, dimension(text, "hidden_size")))


def _causal(config: Config) -> Iterator[TensorSpec]:
    yield from decoder_tensors(config, "model.")
    yield lm_head(config, config)


def _classifier(config: Config) -> Iterator[TensorSpec]:
    yield from decoder_tensors(config, "model.")
    yield score_head(config, config)


DECODER_NAMES: Final = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

TOKENIZER: Final = TokenizerSpec(
    gguf_model="gpt2",
    gguf_pre="qwen2",
    split_pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    classes=("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
)


def vllm_overrides(scorer: str) -> dict[str, object]:
    """The overrides by which vLLM ranks with the yes and no rows of a causal model; `scorer` is its class for that."""
    return {"architectures": [scorer], "classifier_from_token": [NO, YES], "is_original_qwen3_reranker": True}


QWEN3: Final = Family(
    key="qwen3",
    name="Qwen3",
    gguf_architecture="qwen3",
    architectures=(
        Architecture(
            name="Qwen3ForCausalLM",
            family="qwen3",
            is_vision=False,
            head="lm_head",
            unquantized=("lm_head", "model.embed_tokens"),
            prefix="model.",
            tensors=_causal,
        ),
        Architecture(
            name="Qwen3ForSequenceClassification",
            family="qwen3",
            is_vision=False,
            head="score",
            unquantized=("model.embed_tokens", "score"),
            prefix="model.",
            tensors=_classifier,
        ),
    ),
    decoder=decoder_tensors,
    gguf_names=GgufNames(decoder=DECODER_NAMES, layer=LAYER_NAMES),
    reranker=TEXT_RERANKER,
    embedder=TEXT_EMBEDDER,
    rope=RopeSpec(theta=1e6, default_theta=DEFAULT_ROPE_THETA),
    default_head_dim=DEFAULT_HEAD_DIM,
    tokenizer=TOKENIZER,
    model_class="Qwen3Model",
    config_class="Qwen3Config",
    sizes={(1024, 28): "0.6B", (2560, 36): "4B", (4096, 36): "8B"},
    vllm_overrides=vllm_overrides("Qwen3ForSequenceClassification"),
)
