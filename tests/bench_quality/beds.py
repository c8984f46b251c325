"""A test bed: a real model, what it is calibrated on, and how its answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Group:
    """A fused group by its modules' names in a layer.

    `stream`: where the residual stream after the group's output can be seen: the input of a module of the layer, or ""
    for the layer's output; None where the output is not added to it.
    """

    linears: tuple[str, ...]
    stream: str | None = None


@dataclass(frozen=True)
class Batch:
    """Prompts of one length: keyword arguments of the model, which tokens [b, t] count, and the number of each.

    A token after the same beginning is the same token: it counts where it is first read, and has its number everywhere.
    """

    inputs: Mapping[str, Any]
    keep: NDArray[np.bool_]
    numbers: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(np.count_nonzero(self.keep))


@dataclass(frozen=True)
class Bed:
    """`forward(model, batch)` gives the last hidden states [b, t, hidden]; `answers` what is compared, by measure [n, …].

    `layers(model)` are its decoder or encoder layers. `probe` is a number of the answers to
    differentiate, with signs drawn at random where an answer is a vector. `rides`: something is added between the layers.
    """

    name: str
    model: torch.nn.Module
    layers: Callable[[torch.nn.Module], Sequence[torch.nn.Module]]
    groups: tuple[Group, ...]
    forward: Callable[[torch.nn.Module, Batch], torch.Tensor]
    answers: Callable[[torch.nn.Module, Sequence[Batch]], Mapping[str, NDArray[np.float32]]]
    calibration: Sequence[Batch]
    evaluations: Mapping[str, Sequence[Batch]]
    probe: Callable[[torch.nn.Module, Batch, torch.Generator], torch.Tensor]
    rides: bool = False


def numbered(
    prompts: Sequence[Sequence[int]], seen: dict[tuple[int, ...], int]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which tokens [b, t] come after a beginning that no earlier prompt has, and their numbers; `seen` has those so far."""
    keep = np.zeros((len(prompts), len(prompts[0])), np.bool_)
    numbers = np.zeros(keep.shape, np.int64)
    for row, ids in enumerate(prompts):
        for end in range(1, len(ids) + 1):
            start = tuple(ids[:end])
            keep[row, end - 1] = start not in seen
            numbers[row, end - 1] = seen.setdefault(start, len(seen))
    return keep, numbers


def batches(prompts: Sequence[Sequence[int]], most: int = 16) -> list[Batch]:
    """Prompts of ids in batches of equal length, in order of length, so that nothing is padded."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for ids in prompts:
        by_length.setdefault(len(ids), []).append(ids)
    found: list[Batch] = []
    seen: dict[tuple[int, ...], int] = {}
    for _, equal in sorted(by_length.items()):
        for start in range(0, len(equal), most):
            part = equal[start : start + most]
            found.append(Batch({"input_ids": torch.tensor(part)}, *numbered(part, seen)))
    return found
