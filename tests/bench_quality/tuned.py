"""Which fused groups `qtool tune` would keep of a bed's model: the same effects to first order, and the same choice."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from qtool.calibration.choice import Candidate, within
from qtool.calibration.sensitivity import rounding
from tests.bench_quality.beds import Bed

PROMPTS = 128
Place = tuple[int, str]
"""A layer and the first linear of a fused group of it."""


def kept_groups(bed: Bed, budget: float) -> frozenset[Place]:
    """The groups that stay within `budget` bits a weight; a prompt of the calibration is one batch."""
    squares: dict[Place, list[float]] = {}
    deltas: dict[tuple[int, str], torch.Tensor] = {}
    firsts: dict[tuple[int, str], Place] = {}
    candidates = {}
    for index, layer in enumerate(bed.layers(bed.model)):
        for group in bed.groups:
            weights = [layer.get_submodule(name).weight.detach() for name in group.linears]
            found, _ = rounding(weights)
            place = (index, group.linears[0])
            deltas |= {(index, name): delta for name, delta in zip(group.linears, found, strict=True)}
            firsts |= {(index, name): place for name in group.linears}
            squares[place] = []
            candidates[place] = sum(weight.numel() for weight in weights)
    generator = torch.Generator().manual_seed(0)
    for batch in bed.calibration[:PROMPTS]:
        shares = {place: torch.zeros((), requires_grad=True) for place in squares}
        handles = [
            layer.get_submodule(name).register_forward_hook(
                partial(_disturb, deltas[index, name], shares[firsts[index, name]])
            )
            for index, layer in enumerate(bed.layers(bed.model))
            for group in bed.groups
            for name in group.linears
        ]
        try:
            with torch.enable_grad():
                effects = torch.autograd.grad(bed.probe(bed.model, batch, generator), list(shares.values()))
        finally:
            for handle in handles:
                handle.remove()
        for place, effect in zip(shares, effects, strict=True):
            squares[place].append(float(effect) ** 2)
    groups = [
        Candidate(str(place), weights, weights * 9 // 16, weights * 2, drift, drift, 0.1)
        for place, weights in candidates.items()
        for drift in (float(np.sqrt(np.mean(squares[place]))),)
    ]
    chosen = within(groups, budget)
    return frozenset(place for place in candidates if str(place) in chosen)


def _disturb(
    delta: torch.Tensor, share: torch.Tensor, _module: Any, args: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        change = torch.nn.functional.linear(args[0], delta)
    return output + share * change
