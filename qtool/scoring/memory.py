"""What the model has read already: keys and values of each layer, from which several prompts go on.

Rule: a memory is never changed; reading further gives a new one, or, for the last part of a prompt, none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Memory:
    """Keys and values [rows, heads, width, dim] of each layer, and which of the places hold a real token [rows, width]."""

    seen: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def empty(cls, device: torch.device) -> Memory:
        """Nothing read, in one row."""
        return cls(torch.zeros(1, 0, dtype=torch.bool, device=device))

    @property
    def width(self) -> int:
        """The places of a row, padding included."""
        return int(self.seen.shape[1])

    def select(self, rows: torch.Tensor) -> Memory:
        """A memory of these rows, each as often as it is named."""
        return Memory(self.seen[rows], tuple((keys[rows], values[rows]) for keys, values in self.layers))


@dataclass
class Continuation:
    """The cache that a forward pass sees: each of its rows goes on from a row of `memory`.

    It has the one method that attention layers call. transformers' own caches would keep the last parts of prompts too.
    """

    memory: Memory
    parents: torch.Tensor
    keep: bool
    _layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from the prompt's start on."""
        if self.memory.layers:
            known_keys, known_values = self.memory.layers[layer]
            keys = torch.cat([known_keys[self.parents], keys], dim=2)
            values = torch.cat([known_values[self.parents], values], dim=2)
        if self.keep:
            self._layers.append((keys, values))
        return keys, values

    def mask(self, real: torch.Tensor) -> torch.Tensor:
        """[rows, 1, width, memory + width]: what each place may look at, given the real places of this pass."""
        width = real.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
        # Padding sees itself: where nothing came before, an empty row of the softmax would be NaN.
        own = causal & (real[:, None] | torch.eye(width, dtype=torch.bool, device=real.device))
        known = self.memory.seen[self.parents][:, None].expand(-1, width, -1)
        return torch.cat([known, own], dim=2)[:, None]

    def grown(self, real: torch.Tensor) -> Memory:
        """The memory with what this pass has read."""
        return Memory(torch.cat([self.memory.seen[self.parents], real], dim=1), tuple(self._layers))
