"""How much each token's output matters to the answer: the squared gradient of the answer by the output of a linear."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.bench_quality.beds import Batch, Bed

TokenWeights = list[dict[str, list[np.ndarray]]]
"""By layer, by a group's first linear, by batch: the weights [b, t], mean 1 over the tokens that count."""


def token_weights(bed: Bed) -> TokenWeights:
    """The weights under the bed's original model, from one backward pass a batch."""
    generator = torch.Generator().manual_seed(0)
    found: TokenWeights = [{group.linears[0]: [] for group in bed.groups} for _ in bed.layers(bed.model)]
    for batch in bed.calibration:
        for (index, name), squares in _squared_gradients(bed, batch, generator).items():
            found[index][name].append(squares.astype(np.float32))
    for groups in found:
        for name, weights in groups.items():
            counted = [each[batch.keep] for each, batch in zip(weights, bed.calibration, strict=True)]
            mean = np.concatenate(counted).mean()
            groups[name] = [each / mean for each in weights]
    return found


def _squared_gradients(bed: Bed, batch: Batch, generator: torch.Generator) -> dict[tuple[int, str], np.ndarray]:
    outputs: list[tuple[tuple[int, str], torch.Tensor]] = []
    handles = []

    def watch(linear: torch.nn.Module, place: tuple[int, str]) -> None:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs.append((place, output))

        handles.append(linear.register_forward_hook(hook))

    for index, layer in enumerate(bed.layers(bed.model)):
        for group in bed.groups:
            for name in group.linears:
                watch(layer.get_submodule(name), (index, group.linears[0]))
    try:
        with torch.enable_grad():
            bed.probe(bed.model, batch, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
    bed.model.zero_grad()
    squares: dict[tuple[int, str], np.ndarray] = {}
    for place, output in outputs:
        squares[place] = squares.get(place, 0) + output.grad.pow(2).sum(-1).numpy()
    return squares
