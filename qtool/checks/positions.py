"""Rotary embedding and deepstack as a model declares them, against what its published size was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qtool.arch.family import Family


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What a model says of its size and positions; None or empty where it says nothing.

    `sections` are the frequencies given to time, height and width, `head_dim` / 2 together. A size that was not published
    is judged by itself alone.
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
        return self.family.size(self.hidden_size, self.layers)

    @property
    def model(self) -> str:
        """Family and published size, as people say it."""
        return f"{self.family.name} {self.size}".rstrip()

    def markers(self) -> Iterator[tuple[str, str]]:
        """What there is, for people."""
        base = "missing" if self.rope_theta is None else f"base {self.rope_theta:,.0f}"
        yield "rope", f"{base}, sections {list(self.sections)[:3]}" if self.family.is_vision else base
        if self.family.is_vision:
            yield "deepstack", "missing" if self.deepstack_layers is None else f"{self.deepstack_layers} layers"

    def rope_problems(self) -> Iterator[str]:
        """What is wrong with the rotary embedding, each as a clause."""
        published = self.family.rope
        if self.rope_theta is None:
            yield "the base is missing, and engines assume 10,000"
        elif self.size and self.rope_theta != published.theta:
            yield f"the base is {self.rope_theta:,.0f}; {self.model} has {published.theta:,.0f}"
        if self.family.is_vision:
            yield from self._section_problems(published.sections)

    def _section_problems(self, published: tuple[int, ...]) -> Iterator[str]:
        sections = tuple(self.sections)[:3]
        if not sections:
            yield "the sections for time, height and width are missing"
        elif self.size and sections != published:
            yield f"the sections are {list(sections)}; {self.model} has {list(published)}"
        elif sum(sections) != self.head_dim // 2:
            yield f"the sections {list(sections)} do not add up to {self.head_dim // 2}, half a head"

    def deepstack_problems(self) -> Iterator[str]:
        """What is wrong with the number of deepstack layers, each as a clause."""
        if self.family.vision is None:
            return
        published = self.family.vision.deepstack_layers
        if self.deepstack_layers is None:
            yield "the number of deepstack layers is missing, and engines assume 0"
        elif self.size and self.deepstack_layers != published:
            yield f"{self.deepstack_layers} deepstack layers are declared; {self.model} has {published}"
        elif self.deepstack_layers > self.layers:
            yield f"{self.deepstack_layers} deepstack layers are declared; the decoder has {self.layers} layers"
