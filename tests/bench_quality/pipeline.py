"""Calibrates a bed's model layer by layer: the original and the quantized stream side by side, through transformers' layers.

It is short rather than fast: each group's inputs come from running its whole layer again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qtool.calibration.group import Effort, calibrate_group
from qtool.calibration.hessian import predict
from qtool.calibration.moments import Moments, MomentSums
from qtool.formats.nvfp4_kernels import dequantize
from tests.bench_quality.beds import Batch, Bed, Group
from tests.bench_quality.gradients import Gradients, gradients
from tests.bench_quality.tuned import kept_groups

Rounding = Callable[[Sequence[np.ndarray], Moments, Executor, Sequence[np.ndarray] | None], list[np.ndarray]]
"""The restored weights of a fused group, from its weights and moments, and the covariances of its outputs' gradients."""

NOTHING = Moments(np.empty((0, 0)), np.empty(0), None, None, 0)
"""The moments that a recipe without data gets."""


@dataclass(frozen=True)
class Recipe:
    """A recipe of the table; the moments are of original inputs where `sequential` is false."""

    name: str
    round: Rounding
    sequential: bool = True
    needs_data: bool = True
    asymmetric: bool = False
    weighted: bool = False
    two_sided: bool = False
    budget: float | None = None
    """Bits a weight, within which fused groups stay as they are, chosen as `qtool tune` does."""


@dataclass
class Report:
    """What the moments predicted, one number a group, and on how many tokens."""

    tokens: int
    gains: list[float] = field(default_factory=list)
    centred: list[float] = field(default_factory=list)


def calibrated(effort: Effort) -> Rounding:
    """qtool's own rounding."""

    def rounding(
        weights: Sequence[np.ndarray], moments: Moments, pool: Executor, covariances: Sequence[np.ndarray] | None
    ) -> list[np.ndarray]:
        covariance = None if covariances is None else covariances.__getitem__
        result = calibrate_group(weights, moments, effort, pool=pool, output_covariance=covariance)
        return [dequantize(each.packed, each.block_scales, result.global_scale) for each in result.weights]

    return rounding


def quantize(bed: Bed, recipe: Recipe, pool: Executor) -> tuple[torch.nn.Module, Report]:
    """A copy of the bed's model with every linear of its groups rounded by `recipe`."""
    model = copy.deepcopy(bed.model)
    report = Report(sum(batch.tokens for batch in bed.calibration) if recipe.needs_data else 0)
    seen = gradients(bed) if recipe.weighted or recipe.two_sided else None
    with torch.no_grad():
        if recipe.needs_data:
            _Calibration(bed, recipe, pool, report, seen).run(model)
        else:
            for layer in bed.layers(model):
                for group in bed.groups:
                    _round(layer, group, recipe, NOTHING, pool)
    return model, report


def _round(
    layer: torch.nn.Module,
    group: Group,
    recipe: Recipe,
    moments: Moments,
    pool: Executor,
    covariances: Sequence[np.ndarray] | None = None,
) -> None:
    linears = [layer.get_submodule(name) for name in group.linears]
    restored = recipe.round([each.weight.detach().numpy() for each in linears], moments, pool, covariances)
    for linear, weight in zip(linears, restored, strict=True):
        linear.weight.copy_(torch.from_numpy(weight))


class _Calibration:
    def __init__(self, bed: Bed, recipe: Recipe, pool: Executor, report: Report, gradients: Gradients | None) -> None:
        self.bed, self.recipe, self.pool, self.report, self.gradients = bed, recipe, pool, report, gradients
        self.kept = kept_groups(bed, recipe.budget) if recipe.budget else frozenset()
        self.starts = [_start(bed, batch) for batch in bed.calibration]
        self.original = [start.hidden for start in self.starts]
        self.quantized = [start.hidden.clone() for start in self.starts]

    def run(self, model: torch.nn.Module) -> None:
        for index, (layer, rounded) in enumerate(
            zip(self.bed.layers(self.bed.model), self.bed.layers(model), strict=True)
        ):
            seen = [
                _observe(layer, hidden, start.call, self.bed.groups)
                for hidden, start in zip(self.original, self.starts, strict=True)
            ]
            for group in self.bed.groups:
                if (index, group.linears[0]) in self.kept:
                    continue
                moments = self.moments(index, group, rounded, seen)
                covariances = None
                if self.gradients and self.recipe.two_sided:
                    covariances = [self.gradients.covariances[index, name] for name in group.linears]
                _round(rounded, group, self.recipe, moments, self.pool, covariances)
            for number, start in enumerate(self.starts):
                ride = start.rides[index] if start.rides else 0
                self.original[number] = seen[number].output + ride
                self.quantized[number] = _output(rounded(self.quantized[number], **start.call)) + ride

    def moments(self, index: int, group: Group, rounded: torch.nn.Module, seen: Sequence[_Observed]) -> Moments:
        name = group.linears[0]
        linears = [rounded.get_submodule(each) for each in group.linears]
        has_drift = self.recipe.asymmetric and group.stream is not None
        has_cross = self.recipe.asymmetric and not has_drift
        rows, columns = sum(each.weight.shape[0] for each in linears), linears[0].weight.shape[1]
        weights = self.gradients.weights[index, name] if self.gradients and self.recipe.weighted else None
        sums = MomentSums(columns, cross=has_cross, drift=rows if has_drift else 0, pool=self.pool)
        for number, batch in enumerate(self.bed.calibration):
            then = now = seen[number]
            if self.recipe.sequential:
                now = _observe(rounded, self.quantized[number], self.starts[number].call, [group])
            sums.add(
                now.inputs[name].numpy()[batch.keep],
                then.inputs[name].numpy()[batch.keep] if has_cross else None,
                (then.streams[name] - now.streams[name]).numpy()[batch.keep] if has_drift else None,
                weights[number][batch.keep] if weights else None,
            )
        moments = sums.moments()
        if self.recipe.asymmetric:
            predicted = predict(moments)
            self.report.gains.append(predicted.gain)
            self.report.centred.append(predicted.gain_centred)
        return moments


@dataclass(frozen=True)
class _Start:
    """What the first layer is called with for a batch, and what is added after each layer (empty: nothing)."""

    hidden: torch.Tensor
    call: Mapping[str, Any]
    rides: Sequence[torch.Tensor]


class _Stop(Exception):  # noqa: N818  (nothing went wrong)
    pass


def _start(bed: Bed, batch: Batch) -> _Start:
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append((args[0] if args else kwargs["hidden_states"], others))
        if not bed.rides:
            raise _Stop

    def after(_module: Any, _args: Any, result: Any) -> None:
        outputs.append(_output(result))

    layers = bed.layers(bed.model)
    handles = [each.register_forward_pre_hook(before, with_kwargs=True) for each in layers]
    handles += [each.register_forward_hook(after) for each in layers]
    try:
        bed.forward(bed.model, batch)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    rides = [then - output for (then, _), output in zip(calls[1:], outputs, strict=False)]
    hidden, call = calls[0]
    return _Start(hidden, call, [*rides, torch.zeros_like(hidden)] if bed.rides else [])


@dataclass
class _Observed:
    """By each group's first linear its input and the residual stream after it, and the layer's output."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    output: torch.Tensor = field(default_factory=torch.Tensor)


def _observe(
    layer: torch.nn.Module, hidden: torch.Tensor, call: Mapping[str, Any], groups: Sequence[Group]
) -> _Observed:
    """Run the layer; with one group no further than it must."""
    found = _Observed()
    handles = []

    def watch(module: str, place: dict[str, torch.Tensor], name: str, *, is_last: bool) -> None:
        def hook(_module: Any, args: Any) -> None:
            place[name] = args[0]
            if is_last:
                raise _Stop

        handles.append(layer.get_submodule(module).register_forward_pre_hook(hook))

    for group in groups:
        name, is_alone = group.linears[0], len(groups) == 1
        watch(name, found.inputs, name, is_last=is_alone and group.stream is None)
        if group.stream:
            watch(group.stream, found.streams, name, is_last=is_alone)
    try:
        found.output = _output(layer(hidden, **call))
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    found.streams.update({group.linears[0]: found.output for group in groups if group.stream == ""})
    return found


def _output(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
