"""Which prompts run through the model together.

Rule: a batch changes the speed and never the score, so prompts with pictures and prompts without never share one (a
text that spells out a picture token would then be counted as a picture).
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


@dataclass(frozen=True)
class Numbered:
    """A prompt and its place in the caller's list."""

    index: int
    prompt: Prompt

    @property
    def length(self) -> int:
        """The prompt's number of ids."""
        return len(self.prompt.token_ids)


def batches(prompts: Iterable[Prompt], limits: BatchLimits) -> Iterator[list[Numbered]]:
    """Batches of prompts of like length; `prompts` is read lazily, one window at a time."""
    for window in _windows(prompts, limits.window_tokens):
        for group in ([n for n in window if n.prompt.pictures], [n for n in window if not n.prompt.pictures]):
            yield from _packed(sorted(group, key=lambda numbered: numbered.length), limits)


def _windows(prompts: Iterable[Prompt], tokens: int) -> Iterator[list[Numbered]]:
    window: list[Numbered] = []
    held = 0
    for index, prompt in enumerate(prompts):
        window.append(Numbered(index, prompt))
        held += len(prompt.token_ids)
        if held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def _packed(ordered: Sequence[Numbered], limits: BatchLimits) -> Iterator[list[Numbered]]:
    batch: list[Numbered] = []
    for numbered in ordered:
        # Lengths ascend, so the newcomer sets the padded width of the batch.
        if batch and (len(batch) == limits.prompts or (len(batch) + 1) * numbered.length > limits.padded_tokens):
            yield batch
            batch = []
        batch.append(numbered)
    if batch:
        yield batch
