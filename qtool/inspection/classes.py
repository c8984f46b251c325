"""Tensors by what they are for, with types, sizes and bits per weight.

Rule: both formats are classed by llama.cpp's names, so that their tables can be compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_CLASSES: Final = {
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


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file stores it; scales have `type` None and no weights of their own."""

    gguf_name: str
    type: str | None
    weights: int
    nbytes: int


@dataclass(frozen=True)
class TensorClass:
    """All tensors of one purpose; `types` counts them by type, scales left out."""

    name: str
    tensors: int
    types: Mapping[str, int]
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """The class as a JSON object."""
        return {
            "name": self.name, "tensors": self.tensors, "types": dict(self.types), "weights": self.weights,
            "bytes": self.nbytes, "bits_per_weight": round(self.bits_per_weight, 4),
        }  # fmt: skip


def tensor_classes(tensors: Iterable[StoredTensor]) -> tuple[TensorClass, ...]:
    """`tensors` by class, empty classes left out."""
    members: dict[str, list[StoredTensor]] = {name: [] for name in _CLASSES}
    for tensor in tensors:
        members[_class_of(tensor.gguf_name)].append(tensor)
    return tuple(_tensor_class(name, found) for name, found in members.items() if found)


def _class_of(gguf_name: str) -> str:
    return next(name for name, pattern in _CLASSES.items() if re.fullmatch(pattern, gguf_name))


def _tensor_class(name: str, members: list[StoredTensor]) -> TensorClass:
    types = Counter(member.type for member in members if member.type is not None)
    return TensorClass(
        name,
        sum(types.values()),
        dict(types.most_common()),
        sum(member.weights for member in members),
        sum(member.nbytes for member in members),
    )
