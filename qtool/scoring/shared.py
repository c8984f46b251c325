"""Prompts that begin alike are read once as far as they agree: the trunk of all, then a branch for each query.

Rule: what is shared is found in the ids themselves; a prompt's `group` says where to look and never what is there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.scoring.batches import BatchLimits, packed
from qtool.scoring.spans import Span, shared_length

if TYPE_CHECKING:
    import torch

    from qtool.scoring.forward import Forward
    from qtool.scoring.memory import Memory
    from qtool.scoring.prompt import Prompt


@dataclass(frozen=True)
class _Branch:
    """What a group's prompts share ends at `end`; `leaves` are their places in the window."""

    end: int
    leaves: tuple[int, ...]


@dataclass(frozen=True)
class SharedReader:
    """Reads windows of prompts."""

    forward: Forward
    limits: BatchLimits

    def last_hidden(self, window: Sequence[Prompt]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batch by batch the places of prompts in the window, and the hidden states [n, hidden] of their last tokens."""
        spans = [self.forward.span(prompt) for prompt in window]
        trunk = shared_length(spans)
        memory = self.forward.remember([spans[0].part(0, trunk)], [0], self.forward.nothing_read)
        branches = _branches(window, spans, trunk)
        for batch in packed([branch.end for branch in branches], self.limits):
            chosen = [branches[place] for place in batch]
            yield from self._leaves(spans, chosen, self._remember(spans, chosen, trunk, memory))

    def _remember(self, spans: Sequence[Span], branches: Sequence[_Branch], trunk: int, memory: Memory) -> Memory:
        parts = [spans[branch.leaves[0]].part(trunk, branch.end) for branch in branches]
        return self.forward.remember(parts, [0] * len(parts), memory)

    def _leaves(
        self, spans: Sequence[Span], branches: Sequence[_Branch], memory: Memory
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        places = [(row, leaf) for row, branch in enumerate(branches) for leaf in branch.leaves]
        parts = [spans[leaf].part(branches[row].end) for row, leaf in places]
        for batch in packed([memory.width + len(part) for part in parts], self.limits):
            rows, leaves = zip(*(places[index] for index in batch), strict=True)
            yield list(leaves), self.forward.last_hidden([parts[index] for index in batch], rows, memory)


def _branches(window: Sequence[Prompt], spans: Sequence[Span], trunk: int) -> list[_Branch]:
    groups: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(window):
        groups.setdefault(prompt.group, []).append(place)
    return [
        _Branch(max(trunk, shared_length([spans[place] for place in places])), tuple(places))
        for places in groups.values()
    ]
