"""Prompts as padded tensors: token ids, M-RoPE positions, patches, and the dense targets of training.

Rule: a part (head, query, document) is encoded alone only where the tokenizer cuts there anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qtool.arch.prompts import IMAGE_PAD
from qtool.inputs.vision import PatchedImage

IGNORED = -100


@dataclass
class Part:
    """A stretch of one prompt. Targets are by token index: a word to predict, or a verdict (yes = 1)."""

    ids: list[int]
    positions: NDArray[np.int64]  # [3, tokens], from 0: time, height, width
    span: int  # how far the positions of the next part move on
    picture: PatchedImage | None = None
    words: dict[int, int] = field(default_factory=dict)
    verdicts: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Right-padded parts. Shapes: ids [n, t], positions [3, n, t], last [n], patches of all pictures in row order."""

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    spans: torch.Tensor
    grids: torch.Tensor  # [n]: how many pictures a row has, 0 or 1
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None
    words: torch.Tensor  # token id, or IGNORED
    verdicts: torch.Tensor  # 0, 1, or IGNORED


def encode_part(tokenizer: Tokenizer, text: str, picture: PatchedImage | None = None) -> Part:
    """A stretch of a prompt whose placeholders, if any, stand for `picture`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pad = tokenizer.token_to_id(IMAGE_PAD)
    start = ids.index(pad) if picture else len(ids)
    positions, span = _positions(len(ids), start, picture)
    return Part(ids, positions, span, picture)


def _positions(tokens: int, start: int, picture: PatchedImage | None) -> tuple[NDArray[np.int64], int]:
    """Text counts on in all three axes; a picture is a grid at its start, then text goes on after its longer side."""
    if picture is None:
        return np.tile(np.arange(tokens), (3, 1)), tokens
    rows, columns = (extent // 2 for extent in picture.grid_thw[1:])
    grid = np.stack([np.zeros(rows * columns, np.int64), *np.indices((rows, columns)).reshape(2, -1)])
    after = start + max(rows, columns)
    rest = tokens - start - rows * columns
    before, behind = np.tile(np.arange(start), (3, 1)), np.tile(np.arange(rest), (3, 1)) + after
    return np.concatenate([before, grid + start, behind], axis=1), after + rest


def last_token_of(tokenizer: Tokenizer, text: str, spans: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """For each named character span of the text, the index of the token that ends it."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return {
        name: max(index for index, (start, stop) in enumerate(offsets) if start < end and stop > begin)
        for name, (begin, end) in spans.items()
    }


def collate(parts: Sequence[Part]) -> Batch:
    """The parts, padded on the right and stacked."""
    longest = max(len(part.ids) for part in parts)
    ids = torch.zeros(len(parts), longest, dtype=torch.long)
    positions = torch.zeros(3, len(parts), longest, dtype=torch.long)
    words = torch.full((len(parts), longest), IGNORED)
    verdicts = torch.full((len(parts), longest), float(IGNORED))
    for row, part in enumerate(parts):
        ids[row, : len(part.ids)] = torch.tensor(part.ids)
        positions[:, row, : len(part.ids)] = torch.from_numpy(part.positions)
        for index, word in part.words.items():
            words[row, index] = word
        for index, verdict in part.verdicts.items():
            verdicts[row, index] = verdict
    pictures = [part.picture for part in parts if part.picture is not None]
    return Batch(
        ids=ids,
        positions=positions,
        lengths=torch.tensor([len(part.ids) for part in parts]),
        spans=torch.tensor([part.span for part in parts]),
        grids=torch.tensor([int(part.picture is not None) for part in parts]),
        pixel_values=torch.from_numpy(np.concatenate([p.pixel_values for p in pictures])) if pictures else None,
        grid_thw=torch.tensor([p.grid_thw for p in pictures]) if pictures else None,
        words=words,
        verdicts=verdicts,
    )
