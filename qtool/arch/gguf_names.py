"""How a family's tensors are called in GGUF files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

POSITION_EMBEDDING: Final = "v.position_embd.weight"
PATCH_EMBEDDINGS: Final = ("v.patch_embd.weight", "v.patch_embd.weight.1")
"""One for each of the two frames that a patch spans."""
FUSED_GROUPS: Final = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""The modules of a layer that vLLM merges into one matrix product."""
FUSED_QKV: Final = "attn_qkv"
"""What stands for the first group in a file whose converter has merged it already."""

TENSOR_CLASSES: Final[Mapping[str, str]] = {
    "rank head": r"cls\..+",
    "embedding": r"token_embd\..+",
    "output head": r"output\..+",
    "norms": r"(blk\.\d+\.(attn_|attn_q_|attn_k_|ffn_)norm|output_norm|v\.blk\.\d+\.ln[12]|v\.post_ln)\..+",
    "attention": r"blk\.\d+\.attn_.+",
    "feed forward": r"blk\.\d+\.ffn_.+",
    "vision embeddings": r"v\.(patch|position)_embd\..+",
    "vision attention": r"v\.blk\.\d+\.attn_.+",
    "vision feed forward": r"v\.blk\.\d+\.ffn_.+",
    "vision merger": r"mm\..+",
    "deepstack mergers": r"v\.deepstack\..+",
    "other": r".*",
}
"""What tensors are for, by a pattern of their names; the first that matches counts."""

_NUMBERED: Final = re.compile(r"(layers|blocks|deepstack_merger_list)\.(\d+)\.(.+)")
_PREFIXES: Final = ("model.language_model.", "model.visual.", "model.")
_VISION_PREFIX: Final = "model.visual."


@dataclass(frozen=True, kw_only=True)
class GgufNames:
    """llama.cpp's names of the modules of a family.

    `decoder` and `vision` are the modules outside of layers, `layer` and `block` those of one decoder layer and one vision
    block, `deepstack` those of one deepstack merger.
    """

    decoder: Mapping[str, str]
    layer: Mapping[str, str]
    vision: Mapping[str, str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)
    deepstack: Mapping[str, str] = field(default_factory=dict)

    def of(self, hf_name: str, deepstack_layers: Sequence[int] = ()) -> str | None:
        """The name of a canonical tensor name; None where it has none.

        `deepstack_layers`: the vision layers (`deepstack_visual_indexes`) after which the deepstack mergers read.
        """
        prefix = next((each for each in _PREFIXES if hf_name.startswith(each)), "")
        module, _, parameter = hf_name.removeprefix(prefix).rpartition(".")
        name = self._module(module, deepstack_layers, is_vision=prefix == _VISION_PREFIX)
        return f"{name}.{parameter}" if name else None

    def _module(self, module: str, deepstack_layers: Sequence[int], *, is_vision: bool) -> str | None:
        match = _NUMBERED.fullmatch(module)
        if match is None:
            return (self.vision if is_vision else self.decoder).get(module)
        kind, number, rest = match[1], int(match[2]), match[3]
        if kind == "deepstack_merger_list":  # numbered by vision layer, not by its place in the list
            stem, table = f"v.deepstack.{deepstack_layers[number]}", self.deepstack
        else:
            stem, table = (f"v.blk.{number}", self.block) if is_vision else (f"blk.{number}", self.layer)
        return f"{stem}.{table[rest]}" if rest in table else None
