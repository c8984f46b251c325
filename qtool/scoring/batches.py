"""Which prompts run through the model together.

Rule: a batch changes the speed and never the score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from qtool.scoring.prompt import Prompt


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on memory: padded ids in one forward pass, prompts in one, and ids (with their pixels) held at a time."""

    padded_tokens: int = 8192
    prompts: int = 64
    window_tokens: int = 32_768


DEFAULT_LIMITS: Final = BatchLimits()


def windows(prompts: Iterable[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Runs of prompts that are held at a time; `prompts` is read lazily."""
    window: list[Prompt] = []
    held = 0
    for prompt in prompts:
        window.append(prompt)
        held += len(prompt.token_ids)
        if held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def packed(lengths: Sequence[int], limits: BatchLimits) -> Iterator[list[int]]:
    """Batches of places in `lengths`, like lengths together."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Lengths ascend, so the newcomer sets the padded width of the batch.
        if batch and (len(batch) == limits.prompts or (len(batch) + 1) * lengths[place] > limits.padded_tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
