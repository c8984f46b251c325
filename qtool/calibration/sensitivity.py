"""How far the answers move when one fused group alone is quantized: to first order, from one pass back through the layers.

Rounding changes a group's output y by ΔW x; an answer changes by the sum over tokens of (∂answer/∂y) · ΔW x. Forward passes
for every group, which give the exact change, would cost the square of the number of layers; this costs four passes, and
on the demo models it ranks the groups as the exact change does (docs/calibration.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call

from qtool.calibration.moments import Float64
from qtool.calibration.streams import STAGES
from qtool.formats.floats import FLOAT_FORMATS
from qtool.formats.nvfp4 import encode_tables, global_scale, is_usable_scale
from qtool.formats.nvfp4_kernels import dequantize, encode
from qtool.scoring.transformers.prefix import BatchLimits, Continuation, KvPrefix, packed, padded, padded_tokens

if TYPE_CHECKING:
    from qtool.formats.floats import Float32
    from qtool.progress import Advance
    from qtool.scoring.transformers.activations import ActivationStore
    from qtool.scoring.transformers.layerwise import LayerwiseModel, Pictures, Weights
    from qtool.scoring.transformers.prefix import PromptSpan

LIMITS: Final = BatchLimits(padded_tokens=2048)
PROBES: Final = 8
"""Random directions of vectors; each prompt's change is measured along one of them."""


@dataclass(frozen=True)
class GroupEffect:
    """What rounding a fused group alone changes: `change` [prompts] of each answer, along its probe.

    `relative_error` is |w - q| / |w| of its weights.
    """

    group: str
    change: Float32
    relative_error: float


@dataclass(frozen=True)
class Effects:
    """The effects of all groups, in the order of the layers; prompts with equal `probes` [prompts] are measured alike."""

    groups: tuple[GroupEffect, ...]
    probes: NDArray[np.int64]

    def drift(self, quantized: Sequence[str]) -> tuple[float, float]:
        """The root mean square of what rounding these groups together changes, raw and without its mean."""
        changes = [each.change for each in self.groups if each.group in set(quantized)]
        if not changes:
            return 0.0, 0.0
        total: Float64 = np.sum(changes, axis=0, dtype=np.float64)
        return float(np.sqrt(np.mean(total**2))), float(np.sqrt(_variance(total, self.probes)))


def _variance(changes: Float64, probes: NDArray[np.int64]) -> float:
    """The mean square around the mean of each probe, without bias."""
    squares, count = 0.0, 0
    for probe in np.unique(probes):
        mine = changes[probes == probe]
        if len(mine) > 1:
            squares += float(((mine - mine.mean()) ** 2).sum()) * len(mine) / (len(mine) - 1)
            count += len(mine)
    return squares / count if count else float(np.mean(changes**2))


@dataclass(frozen=True)
class _Batch:
    """Whole prompts side by side: nothing is shared, so that each row has a gradient of its own."""

    prompts: Sequence[int]
    spans: Sequence[PromptSpan]

    @property
    def ends(self) -> tuple[range, list[int]]:
        """Where the last tokens are."""
        return range(len(self.spans)), [len(span) - 1 for span in self.spans]


@dataclass(frozen=True)
class Sensitivity:
    """Measures the groups of a model on `spans`; `answer` turns last normed hidden states into log-odds or vectors.

    `fused` are the fused groups to measure by the hf_names of their weights. `store` holds the inputs of all layers.
    """

    model: LayerwiseModel
    answer: Callable[[torch.Tensor], torch.Tensor]
    spans: Sequence[PromptSpan]
    fused: Mapping[str, str]
    pictures: Pictures
    store: ActivationStore
    advance: Advance

    @property
    def work(self) -> int:
        """The steps that `advance` counts: tokens through layers, forward and back."""
        return 2 * self.model.layers * sum(map(len, self.spans))

    def effects(self) -> Effects:
        """Two passes over the layers."""
        batches = [
            _Batch(chosen, [self.spans[index] for index in chosen])
            for chosen in packed([len(span) for span in self.spans], LIMITS)
        ]
        probes = np.zeros(len(self.spans), np.int64)
        with torch.no_grad():
            self._forward(batches)
        for number, batch in enumerate(batches):
            found = self._answers(number, batch)
            if found is not None:
                probes[list(batch.prompts)] = found
        changes: dict[str, Float32] = {}
        errors: dict[str, tuple[float, float]] = {}
        for layer in reversed(range(self.model.layers)):
            self._pull_back(layer, self.model.read_layer(layer), batches, changes, errors)
        names = list(dict.fromkeys(self.fused.values()))
        effects = (GroupEffect(name, changes[name], _relative(errors[name])) for name in names)
        return Effects(tuple(effects), probes)

    def probe_seconds(self) -> float:
        """What both passes will take, from one layer and the longest prompts."""
        longest = sorted(range(len(self.spans)), key=lambda index: len(self.spans[index]))[-1:]
        part = [_Batch(longest, [self.spans[index] for index in longest])]
        with torch.no_grad():
            self.store["in", 0, 0] = self._embedded(part[0])
        self.store["gradient", 0] = torch.ones_like(self.store["in", 0, 0])
        weights = self.model.read_layer(0)
        started = time.monotonic()
        with torch.no_grad():
            self._through(weights, part[0], self.store["in", 0, 0])
        self._pull_back(0, weights, part, {}, {})
        tokens = sum(map(len, self.spans)) / len(self.spans[longest[0]])
        return (time.monotonic() - started) * tokens * self.model.layers

    def _forward(self, batches: Sequence[_Batch]) -> None:
        for number, batch in enumerate(batches):
            self.store["in", 0, number] = self._embedded(batch)
        for layer, weights in enumerate(self.model.layer_weights()):
            for number, batch in enumerate(batches):
                hidden = self._through(weights, batch, self.store["in", layer, number])
                features = self.pictures.features(batch.spans, layer + 1)
                if features is not None:
                    hidden[_is_picture(batch)] += features
                self.store["in", layer + 1, number] = hidden
                self.advance(sum(map(len, batch.spans)))

    def _embedded(self, batch: _Batch) -> torch.Tensor:
        embeds = self.model.embedded(torch.from_numpy(padded([span.ids for span in batch.spans])))
        features = self.pictures.features(batch.spans, 0)
        return embeds if features is None else embeds.masked_scatter(_is_picture(batch)[..., None], features)

    def _answers(self, number: int, batch: _Batch) -> list[int] | None:
        """Put the gradient of each answer by the last layer's output into the store; the probe of each prompt."""
        last = self.store["in", self.model.layers, number]
        ends = last[batch.ends].clone().requires_grad_()
        with torch.enable_grad():
            answers = self.answer(self.model.normed(ends))
            chosen = None
            if answers.dim() > 1:
                directions = (
                    torch.randint(0, 2, (PROBES, answers.shape[1]), generator=torch.Generator().manual_seed(0)).to(
                        answers
                    )
                    * 2
                    - 1
                )
                chosen = [prompt % PROBES for prompt in batch.prompts]
                answers = (answers * directions[chosen]).sum(dim=1)
            (found,) = torch.autograd.grad(answers.sum(), ends)
        gradient = torch.zeros_like(last)
        gradient[batch.ends] = found
        self.store["gradient", number] = gradient
        return chosen

    def _pull_back(
        self,
        layer: int,
        weights: Weights,
        batches: Sequence[_Batch],
        changes: dict[str, Float32],
        errors: dict[str, tuple[float, float]],
    ) -> None:
        """From the gradients of a layer's output those of its input, and on the way what rounding its groups changes."""
        names = self.model.layer_names(layer)
        stages = [stage for stage in STAGES if names[f"{stage[0]}.weight"] in self.fused]
        groups = {stage: self.fused[names[f"{stage[0]}.weight"]] for stage in stages}
        deltas: dict[str, torch.Tensor] = {}
        for stage, group in groups.items():
            found, errors[group] = rounding([weights[f"{linear}.weight"] for linear in stage])
            deltas |= dict(zip(stage, found, strict=True))
            changes[group] = np.zeros(len(self.spans), np.float32)
        for number, batch in enumerate(batches):
            given = self.store["in", layer, number].clone().requires_grad_()
            shares = {stage: torch.zeros(len(batch.spans), requires_grad=True) for stage in stages}
            linears = {linear: (deltas[linear], shares[stage]) for stage in stages for linear in stage}
            with torch.enable_grad(), _disturbed(self.model.layer, linears):
                hidden = self._through(weights, batch, given)
                back, *effects = torch.autograd.grad(hidden, [given, *shares.values()], self.store["gradient", number])
            self.store["gradient", number] = back
            for group, change in zip(groups.values(), effects, strict=True):
                changes[group][list(batch.prompts)] = change.numpy()
            self.advance(sum(map(len, batch.spans)))

    def _through(self, weights: Weights, batch: _Batch, hidden: torch.Tensor) -> torch.Tensor:
        cache = Continuation(
            KvPrefix.empty(self.model.device), torch.zeros(len(batch.spans), dtype=torch.long), keep=False
        )
        positions = torch.from_numpy(padded([span.positions for span in batch.spans]))
        given = {
            "attention_mask": cache.mask(torch.from_numpy(padded_tokens(batch.spans))),
            "past_key_values": cache,
            "position_embeddings": self.model.rotary(hidden, positions),
        }
        after: torch.Tensor = functional_call(self.model.layer, weights, (hidden,), given)
        return after


@contextmanager
def _disturbed(layer: Any, linears: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Add to the output of each linear a share (zero, one a row) of what rounding its weight changes there."""

    def add(
        delta: torch.Tensor, share: torch.Tensor, _module: Any, args: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            change = torch.nn.functional.linear(args[0], delta)
        return output + share[:, None, None] * change

    handles = [
        layer.get_submodule(linear).register_forward_hook(partial(add, *each)) for linear, each in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_picture(batch: _Batch) -> torch.Tensor:
    return torch.from_numpy(padded([span.is_picture for span in batch.spans]))


def rounding(weights: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], tuple[float, float]]:
    """What plain `max` rounding of a fused group changes in its weights, and |q - w|² and |w|² of the group."""
    largest = np.float32(max(float(weight.abs().max()) for weight in weights))
    scale = global_scale(largest)
    if not is_usable_scale(scale):
        return [torch.zeros_like(weight) for weight in weights], (0.0, 1.0)
    tables = encode_tables(scale, FLOAT_FORMATS["F32"])
    deltas, error, power = [], 0.0, 0.0
    for weight in weights:
        values = weight.contiguous().numpy()
        codes, scales = np.empty(values.size // 2, np.uint8), np.empty(values.size // 16, np.uint8)
        squares = encode(values.reshape(-1).view(np.uint32), tables, codes, scales, None)
        error, power = error + squares[0], power + squares[1]
        restored = dequantize(codes.reshape(len(values), -1), scales.reshape(len(values), -1), scale)
        deltas.append(torch.from_numpy(restored - values))
    return deltas, (error, power)


def _relative(squares: tuple[float, float]) -> float:
    error, power = squares
    return float(np.sqrt(error / power)) if power else 0.0
