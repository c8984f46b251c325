"""Where the numbers of a group are computed: by compiled loops on the processors, or by torch on a device."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from typing_extensions import override

from qtool.calibration import kernels
from qtool.calibration.hessian import feedback_factor
from qtool.calibration.moments import Float64, Moments, MomentSums, row_tiles
from qtool.formats.floats import U8, Float32

if TYPE_CHECKING:
    import torch


class Sums(Protocol):
    """The running sums of a group's moments, from tensors on the device of the streams."""

    def add(
        self,
        quantized: torch.Tensor,
        original: torch.Tensor | None = None,
        lack: torch.Tensor | None = None,
        token_weights: Float32 | None = None,
    ) -> None:
        """As `MomentSums.add`."""

    def moments(self) -> Moments:
        """As `MomentSums.moments`."""


class Loops(Protocol):
    """The steps of the rounding. The functions of `rounding` specify what they compute, arrays are as described there."""

    def factor(self, hessian: Float64) -> Float64:
        """The upper triangular U with UᵀU = H⁻¹; see `feedback_factor`."""

    def solve(self, weights: Float32, pull: Float64 | None, drift: Float64 | None, feedback: Float64) -> Float64:
        """(W P + Eᵀ) H⁻¹ [rows, in] for `pull` P [in, in] and `drift` E [in, rows]; UᵀU = H⁻¹."""

    def phase_losses(self, weights: Float32, importance: Float32, scales: Float32) -> Float64:
        """See `phase_losses_reference`."""

    def round(
        self, target: Float32, hessian: Float32, feedback: Float32, scale: np.float32, passes: int
    ) -> tuple[U8, U8]:
        """See `sweep_reference`, then `descend_reference`."""

    def descend_two_sided(
        self,
        codes: U8,
        scales: U8,
        target: Float32,
        hessian: Float32,
        covariance: Float32,
        scale: np.float32,
        passes: int,
    ) -> None:
        """See `descend_two_sided_reference`."""


@dataclass(frozen=True)
class CompiledLoops(Loops):
    """The loops of `kernels`, rows divided among the threads of `pool`, always into the same parts."""

    pool: Executor

    @override
    def factor(self, hessian: Float64) -> Float64:
        return feedback_factor(hessian)

    @override
    def solve(self, weights: Float32, pull: Float64 | None, drift: Float64 | None, feedback: Float64) -> Float64:
        def part(rows: slice) -> Float64:
            lack = np.zeros((rows.stop - rows.start, len(feedback)))
            if pull is not None:
                lack += weights[rows].astype(np.float64) @ pull
            if drift is not None:
                lack += drift[:, rows].T
            solved: Float64 = lack @ feedback.T @ feedback
            return solved

        return np.concatenate(list(self.pool.map(part, row_tiles(len(weights)))))

    @override
    def phase_losses(self, weights: Float32, importance: Float32, scales: Float32) -> Float64:
        phases = [scales[phase : phase + 1] for phase in range(len(scales))]
        return np.concatenate(list(self.pool.map(lambda each: kernels.phase_losses(weights, importance, each), phases)))

    @override
    def round(
        self, target: Float32, hessian: Float32, feedback: Float32, scale: np.float32, passes: int
    ) -> tuple[U8, U8]:
        def part(rows: slice) -> tuple[U8, U8]:
            codes, scales = kernels.sweep(target[rows], feedback, scale)
            kernels.descend(codes, scales, target[rows], hessian, scale, passes)
            return codes, scales

        codes, scales = zip(*self.pool.map(part, row_tiles(len(target))), strict=True)
        return np.concatenate(codes), np.concatenate(scales)

    @override
    def descend_two_sided(
        self,
        codes: U8,
        scales: U8,
        target: Float32,
        hessian: Float32,
        covariance: Float32,
        scale: np.float32,
        passes: int,
    ) -> None:
        def product(left: Float32, right: Float32) -> Float32:
            return np.concatenate(list(self.pool.map(lambda rows: left[rows] @ right, row_tiles(len(left)))))

        kernels.descend_two_sided(codes, scales, target, hessian, covariance, scale, passes, product)


def loops_on(device: torch.device | None, pool: Executor) -> Loops:
    """The loops for a device: compiled ones on the CPU, those of torch on any other."""
    if device is None or device.type == "cpu":
        return CompiledLoops(pool)
    from qtool.calibration.on_torch import TorchLoops

    return TorchLoops(device)


def new_sums(columns: int, *, cross: bool = False, drift: int = 0, pool: Executor, device: torch.device) -> Sums:
    """Empty sums; see `MomentSums`."""
    if device.type == "cpu":
        return _HostSums(MomentSums(columns, cross=cross, drift=drift, pool=pool))
    from qtool.calibration.on_torch import TorchSums

    return TorchSums(columns, cross=cross, drift=drift, device=device)


@dataclass(frozen=True)
class _HostSums(Sums):
    sums: MomentSums

    @override
    def add(
        self,
        quantized: torch.Tensor,
        original: torch.Tensor | None = None,
        lack: torch.Tensor | None = None,
        token_weights: Float32 | None = None,
    ) -> None:
        wanted, missing = (None if each is None else each.contiguous().numpy() for each in (original, lack))
        self.sums.add(quantized.contiguous().numpy(), wanted, missing, token_weights)

    @override
    def moments(self) -> Moments:
        return self.sums.moments()
