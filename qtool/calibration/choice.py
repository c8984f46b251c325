"""Which fused groups stay unquantized, or get more bits, within a budget: the largest drift avoided for each bit first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qtool.calibration.sensitivity import Effects
from qtool.errors import UsageError
from qtool.export.quantize_plan import PlannedTensor, QuantizationPlan


@dataclass(frozen=True)
class Candidate:
    """A fused group of a plan: how many weights, their bytes quantized and as they are, and what rounding it alone costs.

    Block scales count, the four bytes of a global scale do not: NVFP4 has 4.5 bits a weight.
    `raw` and `centred` are the root mean square of the change of the answers, all of it and without its mean.
    """

    group: str
    weights: int
    quantized_bytes: int
    kept_bytes: int
    raw: float
    centred: float
    relative_error: float

    @property
    def gain(self) -> float:
        """Mean square of the centred change that keeping the group avoids, for each byte that it costs."""
        return self.centred**2 / max(self.kept_bytes - self.quantized_bytes, 1)


def candidates(plan: QuantizationPlan, effects: Effects) -> tuple[Candidate, ...]:
    """The quantized groups of a plan, in the order of the layers."""
    found = {each.group: each for each in effects.groups}
    return tuple(_candidate(group, members, plan, effects, found[group].relative_error)
                 for group, members in plan.groups.items())  # fmt: skip


def _candidate(
    group: str, members: Sequence[PlannedTensor], plan: QuantizationPlan, effects: Effects, error: float
) -> Candidate:
    raw, centred = effects.drift([group])
    return Candidate(
        group=group,
        weights=sum(member.elements for member in members),
        quantized_bytes=sum(o.nbytes for member in members for o in member.outputs(plan.recipe.block_size) if o.shape),
        kept_bytes=sum(member.source.nbytes for member in members),
        raw=raw,
        centred=centred,
        relative_error=error,
    )


def bits_per_weight(groups: Sequence[Candidate], kept: Sequence[str] = ()) -> float:
    """Bits of the groups over their weights, scales included, where those of `kept` stay as they are."""
    nbytes = sum(each.kept_bytes if each.group in kept else each.quantized_bytes for each in groups)
    return 8 * nbytes / sum(each.weights for each in groups)


def ranked(groups: Sequence[Candidate]) -> list[Candidate]:
    """The groups in the order in which they are kept; those that cost nothing, as after a rounding to zero, come last."""
    return sorted(groups, key=lambda each: (-each.gain, each.group))


def within(groups: Sequence[Candidate], budget: float) -> tuple[str, ...]:
    """The groups that stay within `budget` bits a weight. Raises UsageError where no group fits."""
    least, most = bits_per_weight(groups), bits_per_weight(groups, [each.group for each in groups])
    if not least <= budget <= most:
        raise UsageError(
            f"A budget of {budget:g} bits per weight is out of range: all quantized are {least:.2f}, none {most:g}.",
            f"Pass --budget between {least + 0.1:.1f}bpw and {most:g}bpw.",
        )
    kept: list[str] = []
    for each in ranked(groups):
        if bits_per_weight(groups, [*kept, each.group]) <= budget:
            kept.append(each.group)
    if not kept:
        smallest = min(bits_per_weight(groups, [each.group]) for each in groups)
        raise UsageError(
            f"No fused group fits into {budget:g} bits per weight; the smallest one kept makes {smallest:.2f}.",
            f"Pass --budget {smallest + 0.005:.2f}bpw or more.",
        )
    return tuple(kept)


# llama.cpp's types. The same sensitivities, scaled by what each type loses, choose one for every matrix.


@dataclass(frozen=True)
class Level:
    """A type of llama.cpp: bits a weight, and the relative error of weights that was measured (docs/verify.md)."""

    name: str
    bits: float
    relative_error: float


LEVELS: Final = (
    Level("q4_k", 4.5, 0.074),
    Level("q5_k", 5.5, 0.038),
    Level("q6_k", 6.5625, 0.019),
    Level("q8_0", 8.5, 0.0056),
)
SUPER_BLOCK: Final = 256
"""Columns that a K-quant packs together."""


def levels_within(groups: Sequence[Candidate], budget: float) -> Mapping[str, Level]:
    """A type for each group, such that all take at most `budget` bits a weight; the least one of all if it is less."""
    chosen = {each.group: 0 for each in groups}
    left = (budget - LEVELS[0].bits) * sum(each.weights for each in groups)
    steps = [step for each in groups for step in _step(each, 0)]
    heapq.heapify(steps)
    known = {each.group: each for each in groups}
    while steps:
        _, group, level = heapq.heappop(steps)
        cost = (LEVELS[level].bits - LEVELS[level - 1].bits) * known[group].weights
        if cost <= left:
            left -= cost
            chosen[group] = level
            for step in _step(known[group], level):
                heapq.heappush(steps, step)
    return {group: LEVELS[level] for group, level in chosen.items()}


def _step(each: Candidate, level: int) -> Iterator[tuple[float, str, int]]:
    """The next level of a group, and what it gains for a bit (negated, for a heap)."""
    if level + 1 == len(LEVELS):
        return
    now, then = LEVELS[level], LEVELS[level + 1]
    scale = (now.relative_error**2 - then.relative_error**2) / max(each.relative_error, 1e-9) ** 2
    yield -(each.centred**2) * scale / ((then.bits - now.bits) * each.weights), each.group, level + 1
