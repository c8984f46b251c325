"""Calibrates a bed's model layer by layer: the original and the quantized stream side by side, through transformers' layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qtool.calibration.group import Effort, calibrate_group
from qtool.calibration.hessian import predict
from qtool.calibration.moments import Moments, MomentSums
from qtool.formats.nvfp4_kernels import dequantize
from tests.bench_quality.beds import Batch, Bed, Group

Rounding = Callable[[Sequence[np.ndarray], Moments, Executor], list[np.ndarray]]
"""The restored weights of a fused group, from its weights and moments."""


@dataclass(frozen=True)
class Recipe:
    """A recipe of the table; the moments are of original inputs where `sequential` is false."""

    name: str
    round: Rounding
    sequential: bool = True
    needs_data: bool = True
    asymmetric: bool = False
    weighted: bool = False


@dataclass
class Report:
    """What the moments predicted: one number a group, over all layers."""

    gains: list[float]
    centred: list[float]
    tokens: int = 0


class _Stop(Exception):
    pass


def quantize(bed: Bed, recipe: Recipe, pool: Executor) -> tuple[torch.nn.Module, Report]:
    """A copy of the bed's model with every linear of its groups rounded by `recipe`."""
    model = copy.deepcopy(bed.model)
    report = Report([], [], sum(batch.tokens for batch in bed.calibration))
    if not recipe.needs_data:
        with torch.no_grad():
            for layer in bed.layers(model):
                for group in bed.groups:
                    _round(layer, group, recipe, NOTHING, pool)
        return model, report
    token_weights = _token_weights(bed) if recipe.weighted else None
    with torch.no_grad():
        started = [_start(bed, batch) for batch in bed.calibration]
        original = [hidden for hidden, _, _ in started]
        quantized = [hidden.clone() for hidden in original]
        for index, (layer, rounded) in enumerate(zip(bed.layers(bed.model), bed.layers(model), strict=True)):
            seen = [_observe(layer, hidden, call, bed.groups) for hidden, (_, call, _) in zip(original, started, strict=True)]
            for group in bed.groups:
                moments = _moments(bed, recipe, group, rounded, quantized, started, seen, token_weights, index, pool)
                if recipe.asymmetric:
                    predicted = predict(moments)
                    report.gains.append(predicted.gain)
                    report.centred.append(predicted.gain_centred)
                _round(rounded, group, recipe, moments, pool)
            for number, (_, call, rides) in enumerate(started):
                ride = rides[index] if rides else 0
                original[number] = seen[number][""][0] + ride
                quantized[number] = _output(rounded(quantized[number], **call)) + ride
    return model, report


NOTHING = Moments(np.empty((0, 0)), np.empty(0), None, None, 0)


def _round(layer: torch.nn.Module, group: Group, recipe: Recipe, moments: Moments, pool: Executor) -> None:
    linears = [layer.get_submodule(name) for name in group.linears]
    restored = recipe.round([_array(each.weight) for each in linears], moments, pool)
    for linear, weight in zip(linears, restored, strict=True):
        linear.weight.copy_(torch.from_numpy(weight))


def _moments(
    bed: Bed,
    recipe: Recipe,
    group: Group,
    rounded: torch.nn.Module,
    quantized: Sequence[torch.Tensor],
    started: Sequence[Any],
    seen: Sequence[Mapping[str, Any]],
    token_weights: Any,
    index: int,
    pool: Executor,
) -> Moments:
    linears = [rounded.get_submodule(name) for name in group.linears]
    rows, columns = sum(each.weight.shape[0] for each in linears), linears[0].weight.shape[1]
    has_drift = recipe.asymmetric and group.stream is not None
    sums = MomentSums(columns, cross=recipe.asymmetric and not has_drift, drift=rows if has_drift else 0, pool=pool)
    for number, batch in enumerate(bed.calibration):
        inputs, stream = seen[number][group.linears[0]]
        now, now_stream = inputs, stream
        if recipe.sequential:
            now, now_stream = _observe(rounded, quantized[number], started[number][1], [group])[group.linears[0]]
        keep = batch.keep
        sums.add(
            _array(now)[keep],
            _array(inputs)[keep] if recipe.asymmetric and not has_drift else None,
            _array(stream - now_stream)[keep] if has_drift else None,
            token_weights[index][group.linears[0]][number][keep] if token_weights else None,
        )
    return sums.moments()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _output(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start(bed: Bed, batch: Batch) -> tuple[torch.Tensor, dict[str, Any], list[torch.Tensor]]:
    """What the first layer is called with, and what is added after each layer."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        if not bed.rides:
            raise _Stop

    layers = bed.layers(bed.model)
    handles = [each.register_forward_pre_hook(before, with_kwargs=True) for each in layers]
    handles += [each.register_forward_hook(lambda _m, _a, result: outputs.append(_output(result))) for each in layers]
    with hooks(*handles):
        try:
            bed.forward(bed.model, batch)
        except _Stop:
            return (*calls[0], [])
    rides = [then - output for (then, _), output in zip(calls[1:], outputs, strict=False)]
    return (*calls[0], [*rides, torch.zeros_like(calls[0][0])])


def _observe(
    layer: torch.nn.Module, hidden: torch.Tensor, call: Mapping[str, Any], groups: Sequence[Group]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """By each group's first linear its input and the stream after it; "" has the layer's output where the layer ended."""
    found: dict[str, Any] = {group.linears[0]: [None, None] for group in groups}
    alone = groups[0] if len(groups) == 1 else None

    def keep_input(name: str, place: int, *, stop: bool) -> Callable[..., None]:
        def hook(_module: Any, args: Any) -> None:
            found[name][place] = args[0]
            if stop:
                raise _Stop

        return hook

    handles = []
    for group in groups:
        name = group.linears[0]
        stop = alone is not None and group.stream is None
        handles.append(layer.get_submodule(name).register_forward_pre_hook(keep_input(name, 0, stop=stop)))
        if group.stream:
            hook = keep_input(name, 1, stop=alone is not None)
            handles.append(layer.get_submodule(group.stream).register_forward_pre_hook(hook))
    with hooks(*handles):
        try:
            output = _output(layer(hidden, **call))
        except _Stop:
            return {name: tuple(pair) for name, pair in found.items()}
    for group in groups:
        if group.stream == "":
            found[group.linears[0]][1] = output
    return {**{name: tuple(pair) for name, pair in found.items()}, "": (output, None)}


def calibrated(effort: Effort) -> Rounding:
    """qtool's own rounding."""

    def rounding(weights: Sequence[np.ndarray], moments: Moments, pool: Executor) -> list[np.ndarray]:
        result = calibrate_group(weights, moments, effort, pool=pool)
        return [dequantize(each.packed, each.block_scales, result.global_scale) for each in result.weights]

    return rounding


def _token_weights(bed: Bed) -> list[dict[str, list[np.ndarray]]]:
    """By layer, group and batch the weight [b, t] of each token: the squared gradient of the answer, mean 1 over kept tokens."""
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, list[np.ndarray]]] = [{group.linears[0]: [] for group in bed.groups} for _ in bed.layers(bed.model)]
    for batch in bed.calibration:
        taken: list[tuple[int, str, torch.Tensor]] = []
        handles = []
        for index, layer in enumerate(bed.layers(bed.model)):
            for group in bed.groups:
                for name in group.linears:
                    def hook(_m: Any, _a: Any, output: torch.Tensor, place: tuple[int, str] = (index, group.linears[0])) -> torch.Tensor:
                        output.requires_grad_()
                        output.retain_grad()
                        taken.append((*place, output))
                        return output

                    handles.append(layer.get_submodule(name).register_forward_hook(hook))
        with hooks(*handles), torch.enable_grad():
            assert bed.probe is not None
            bed.probe(bed.model, batch, generator).backward()
        parts: dict[tuple[int, str], np.ndarray] = {}
        for index, name, output in taken:
            squares = output.grad.pow(2).sum(-1).numpy()
            parts[index, name] = parts.get((index, name), 0) + squares
        for (index, name), squares in parts.items():
            found[index][name].append(squares.astype(np.float32))
    for groups in found:
        for weights in groups.values():
            total = np.concatenate([each[batch.keep] for each, batch in zip(weights, bed.calibration, strict=True)])
            for each in weights:
                each /= total.mean()
    return found
