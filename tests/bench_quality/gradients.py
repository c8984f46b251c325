"""The gradient of the answer by the output of each linear, through a whole model: for models that the engine does not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qtool.calibration.gradients import token_weights
from tests.bench_quality.beds import Batch, Bed

Place = tuple[int, str]
"""A layer and a linear of it."""


@dataclass(frozen=True)
class Gradients:
    """`weights`: by a group's layer and first linear, by batch, the weight [b, t] of each token, mean 1 over those that count.

    `covariances`: by layer and linear the mean of g gᵀ [out, out] over the tokens that count. A token that prompts share
    matters to all of them.
    """

    weights: dict[Place, list[np.ndarray]]
    covariances: dict[Place, np.ndarray]


def gradients(bed: Bed) -> Gradients:
    """The gradients under the bed's original model, from one backward pass a batch."""
    generator = torch.Generator().manual_seed(0)
    groups = {
        (index, name): (index, group.linears[0])
        for index, _ in enumerate(bed.layers(bed.model))
        for group in bed.groups
        for name in group.linears
    }
    squares: dict[Place, list[np.ndarray]] = {place: [] for place in groups.values()}
    sums: dict[Place, Any] = {}
    for batch in bed.calibration:
        found: dict[Place, Any] = {}
        for place, gradient in _backward(bed, batch, generator).items():
            counted = gradient.reshape(-1, gradient.shape[-1]).astype(np.float64)
            sums[place] = sums.get(place, 0) + counted.T @ counted
            found[groups[place]] = found.get(groups[place], 0) + (gradient**2).sum(-1)
        for place, each in found.items():
            squares[place].append(each.astype(np.float32))
    count = 1 + max(int(batch.numbers.max()) for batch in bed.calibration)
    weights: dict[Place, list[np.ndarray]] = {}
    for place, each in squares.items():
        total = np.zeros(count, np.float32)
        for batch, found in zip(bed.calibration, each, strict=True):
            np.add.at(total, batch.numbers, found)
        (counted,) = token_weights([total])
        weights[place] = [counted[batch.numbers] for batch in bed.calibration]
    return Gradients(weights, {place: total / count for place, total in sums.items()})


def _backward(bed: Bed, batch: Batch, generator: torch.Generator) -> dict[Place, np.ndarray]:
    outputs: dict[Place, torch.Tensor] = {}
    handles = []

    def watch(linear: torch.nn.Module, place: Place) -> None:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[place] = output

        handles.append(linear.register_forward_hook(hook))

    for index, layer in enumerate(bed.layers(bed.model)):
        for group in bed.groups:
            for name in group.linears:
                watch(layer.get_submodule(name), (index, name))
    try:
        with torch.enable_grad():
            bed.probe(bed.model, batch, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
    bed.model.zero_grad()
    return {place: output.grad.numpy() for place, output in outputs.items()}
