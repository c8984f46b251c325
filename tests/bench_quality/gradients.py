"""The gradient of the answer by the output of each linear: which tokens matter, and which outputs act together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.bench_quality.beds import Batch, Bed

Place = tuple[int, str]
"""A layer and a linear of it."""


@dataclass(frozen=True)
class Gradients:
    """`weights`: by a group's layer and first linear, by batch, the weight [b, t] of each token, mean 1 over those that count.

    `covariances`: by layer and linear the mean of g gᵀ [out, out] over the tokens that count.
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
            counted = gradient[batch.keep].astype(np.float64)
            sums[place] = sums.get(place, 0) + counted.T @ counted
            found[groups[place]] = found.get(groups[place], 0) + (gradient**2).sum(-1)
        for place, each in found.items():
            squares[place].append(each.astype(np.float32))
    tokens = sum(batch.tokens for batch in bed.calibration)
    for place, weights in squares.items():
        counted = [each[batch.keep] for each, batch in zip(weights, bed.calibration, strict=True)]
        mean = np.concatenate(counted).mean()
        squares[place] = [each / mean for each in weights]
    return Gradients(squares, {place: total / tokens for place, total in sums.items()})


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
