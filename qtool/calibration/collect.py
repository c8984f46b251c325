"""Collects the second moments of the inputs of all linears of a decoder: squares of columns, and on request Hessians."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.detect import Detection
from qtool.calibration.moments import Moments, MomentSums
from qtool.errors import ModelError
from qtool.formats.floats import Float32

HESSIAN_MEMORY: Final = 2 << 30
"""Bytes of sums that are held at a time; what does not fit is collected in another pass over the data."""


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same input [tokens, columns]: a fused group, named by its module, and its members' weights."""

    module: str
    hf_names: tuple[str, ...]
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of its running sum in float64."""
        return 8 * self.columns**2


def input_groups(detection: Detection) -> tuple[InputGroup, ...]:
    """The fused groups of an architecture, layer by layer."""
    found: dict[str, InputGroup] = {}
    for spec in detection.architecture.tensors(detection.config):
        if spec.fused_group:
            known = found.get(spec.fused_group)
            names = (*(known.hf_names if known else ()), spec.hf_name)
            found[spec.fused_group] = InputGroup(spec.fused_group, names, spec.shape[1])
    return tuple(found.values())


def passes(groups: Sequence[InputGroup], memory: int = HESSIAN_MEMORY) -> list[list[InputGroup]]:
    """The groups divided such that the sums of each part need at most `memory`, or are one group's."""
    parts: list[list[InputGroup]] = [[]]
    for group in groups:
        if parts[-1] and sum(each.nbytes for each in parts[-1]) + group.nbytes > memory:
            parts.append([])
        parts[-1].append(group)
    return parts


@dataclass
class SquareSums:
    """What llama.cpp's importance matrix holds of one input: the sum of squares of each column [in], and of how many tokens."""

    squares: NDArray[np.float64]
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int) -> SquareSums:
        """Before the first token."""
        return cls(np.zeros(columns))

    def add(self, inputs: Float32) -> None:
        """Add tokens [tokens, in]; squares are float32 as in llama.cpp, and their sum float64, which no order changes much."""
        self.squares += np.square(inputs).sum(axis=0, dtype=np.float64)
        self.tokens += len(inputs)

    @property
    def mean_square(self) -> float:
        """Over tokens and columns."""
        return float(self.squares.mean()) / max(self.tokens, 1)


@dataclass
class Collector:
    """Takes the inputs of linears, however these are run, and sums them up by group.

    `squares` has every group; the Hessians are those of the groups that are summed at the moment.
    """

    groups: Sequence[InputGroup]
    squares: dict[str, SquareSums] = field(default_factory=dict)
    _sums: dict[str, MomentSums] = field(default_factory=dict)
    _is_first: bool = True

    def __post_init__(self) -> None:
        self.squares.update({group.module: SquareSums.empty(group.columns) for group in self.groups})

    def begin(self, hessians: Sequence[InputGroup]) -> list[InputGroup]:
        """Start a pass that also sums the Hessians of these groups; returns the groups whose inputs it needs."""
        self._sums = {group.module: MomentSums(group.columns) for group in hessians}
        return list(self.groups) if self._is_first else list(hessians)

    def take(self, module: str, inputs: Float32) -> None:
        """Inputs [tokens, in] of a group that were not taken before in this pass."""
        if self._is_first:
            self.squares[module].add(inputs)
        if module in self._sums:
            self._sums[module].add(inputs)

    def end(self) -> Iterator[tuple[str, Moments]]:
        """End the pass: the moments of its groups, each freed before the next. Raises ModelError for what is not finite."""
        if self._is_first:
            for module, sums in self.squares.items():
                if not np.isfinite(sums.squares).all():
                    raise ModelError(
                        f"The inputs of {module} are not finite numbers.",
                        "Check the weights; they may be too large for the chosen --dtype.",
                    )
        self._is_first = False
        for module in list(self._sums):
            yield module, self._sums.pop(module).moments()


Run = Callable[[Sequence[InputGroup], Callable[[str, Float32], None]], None]
"""Runs the model over the data once, and calls the function for the inputs of these groups."""


def collect(collector: Collector, run: Run, parts: Sequence[Sequence[InputGroup]]) -> Iterator[tuple[str, Moments]]:
    """Run the model once for each of `parts`, the groups whose Hessians are summed together; yields their moments."""
    for part in parts or [()]:
        run(collector.begin(part), collector.take)
        yield from collector.end()
