"""What llama.cpp calls each tensor of the family.

Rule: names are data; a tensor without a name here is an error where the plan is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

RANK_HEAD: Final = "cls.output.weight"
TOKEN_EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
POSITION_EMBEDDING: Final = "v.position_embd.weight"
PATCH_EMBEDDINGS: Final = ("v.patch_embd.weight", "v.patch_embd.weight.1")
"""One for each of the two frames that a patch spans."""

_DECODER: Final[Mapping[str, str]] = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
_LAYER: Final[Mapping[str, str]] = {
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
_VISION: Final[Mapping[str, str]] = {
    "patch_embed.proj": "v.patch_embd",
    "pos_embed": "v.position_embd",
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}
_VISION_BLOCK: Final[Mapping[str, str]] = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_DEEPSTACK: Final[Mapping[str, str]] = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}

_NUMBERED: Final = re.compile(r"(layers|blocks|deepstack_merger_list)\.(\d+)\.(.+)")
_PREFIXES: Final = ("model.language_model.", "model.visual.", "model.")


def gguf_name_of(hf_name: str, deepstack_layers: Sequence[int] = ()) -> str | None:
    """llama.cpp's name of a canonical tensor name; None where it has none.

    `deepstack_layers`: the vision layers (`deepstack_visual_indexes`) after which the deepstack mergers read.
    """
    prefix = next((p for p in _PREFIXES if hf_name.startswith(p)), "")
    module, _, parameter = hf_name.removeprefix(prefix).rpartition(".")
    name = _module_name(module, deepstack_layers, is_vision=prefix == "model.visual.")
    return f"{name}.{parameter}" if name else None


def _module_name(module: str, deepstack_layers: Sequence[int], *, is_vision: bool) -> str | None:
    match = _NUMBERED.fullmatch(module)
    if match is None:
        return (_VISION if is_vision else _DECODER).get(module)
    kind, number, rest = match[1], int(match[2]), match[3]
    if kind == "deepstack_merger_list":  # numbered by vision layer, not by its place in the list
        stem, table = f"v.deepstack.{deepstack_layers[number]}", _DEEPSTACK
    else:
        stem, table = (f"v.blk.{number}", _VISION_BLOCK) if is_vision else (f"blk.{number}", _LAYER)
    return f"{stem}.{table[rest]}" if rest in table else None
