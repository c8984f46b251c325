"""The published sizes of the family and the positions they were trained with.

Rule: numbers come from the publisher's config.json; a size that is not listed is judged by itself alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Family:
    """`gguf_architecture` and `name` for one family of models."""

    name: str
    gguf_architecture: str
    is_vision: bool


QWEN3: Final = Family("Qwen3", "qwen3", is_vision=False)
QWEN3_VL: Final = Family("Qwen3-VL", "qwen3vl", is_vision=True)
FAMILIES: Final = (QWEN3, QWEN3_VL)

_THETA: Final = {QWEN3: 1e6, QWEN3_VL: 5e6}
_SECTIONS: Final = (24, 20, 20)
_DEEPSTACK_LAYERS: Final = 3
_SIZES: Final = {
    (QWEN3, 1024, 28): "0.6B", (QWEN3, 2560, 36): "4B", (QWEN3, 4096, 36): "8B",
    (QWEN3_VL, 2048, 28): "2B", (QWEN3_VL, 2560, 36): "4B", (QWEN3_VL, 4096, 36): "8B",
}  # fmt: skip
"""By hidden size and layers."""


@dataclass(frozen=True)
class Positions:
    """What a model says of its size and positions; None or empty where it says nothing.

    `sections` are the frequencies given to time, height and width, `head_dim` / 2 together.
    """

    family: Family
    hidden_size: int
    layers: int
    head_dim: int
    rope_theta: float | None
    sections: Sequence[int]
    deepstack_layers: int | None

    @property
    def size(self) -> str:
        """The published size, empty if it is none."""
        return _SIZES.get((self.family, self.hidden_size, self.layers), "")

    def markers(self) -> Iterator[tuple[str, str]]:
        """What there is, for people."""
        base = "missing" if self.rope_theta is None else f"base {self.rope_theta:,.0f}"
        yield "rope", f"{base}, sections {list(self.sections)[:3]}" if self.family.is_vision else base
        if self.family.is_vision:
            yield "deepstack", "missing" if self.deepstack_layers is None else f"{self.deepstack_layers} layers"

    def rope_problems(self) -> Iterator[str]:
        """What is wrong with the rotary embedding."""
        if self.rope_theta is None:
            yield "its base is missing, and engines take 10,000"
        elif self.size and self.rope_theta != _THETA[self.family]:
            yield f"its base is {self.rope_theta:,.0f}, and {self.family.name} {self.size} has {_THETA[self.family]:,.0f}"
        if self.family.is_vision:
            yield from self._section_problems()

    def _section_problems(self) -> Iterator[str]:
        sections = tuple(self.sections)[:3]
        if not sections:
            yield "the sections for time, height and width are missing"
        elif self.size and sections != _SECTIONS:
            yield f"its sections are {list(sections)}, and {self.family.name} {self.size} has {list(_SECTIONS)}"
        elif sum(sections) != self.head_dim // 2:
            yield f"its sections {list(sections)} do not add up to {self.head_dim // 2}, half a head"

    def deepstack_problems(self) -> Iterator[str]:
        """What is wrong with the number of deepstack layers."""
        if not self.family.is_vision:
            return
        if self.deepstack_layers is None:
            yield "the number of deepstack layers is missing, and engines take 0"
        elif self.size and self.deepstack_layers != _DEEPSTACK_LAYERS:
            yield f"{self.deepstack_layers} deepstack layers are declared, and {self.family.name} has {_DEEPSTACK_LAYERS}"
        elif self.deepstack_layers > self.layers:
            yield f"{self.deepstack_layers} deepstack layers are declared, and the decoder has {self.layers} layers"
