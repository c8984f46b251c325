"""The rounding's steps as batched torch, for a device other than the CPU: the same as the compiled loops, but for ties.

Sums of products are taken in the order of the device's libraries, so a weight that lies between two codes may take the
other one. The two-sided descent, in which each row waits for the one before, runs compiled; its large products do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from typing_extensions import override

from qtool.calibration import kernels
from qtool.calibration.loops import Loops, Sums
from qtool.calibration.moments import TOKENS_SUMMED, Float64, Moments, require_finite
from qtool.calibration.rounding import BATCH, CANDIDATES, LARGEST_SCALE, MIDPOINTS, SMALLEST_SCALE
from qtool.errors import ModelError
from qtool.formats.floats import E4M3_MAX, E4M3_MIN, E4M3_VALUES, U8, Float32
from qtool.formats.nvfp4 import BLOCK, E2M1_VALUES

_HALFWAY = (E4M3_VALUES[:0x7E] + E4M3_VALUES[1:0x7F]) / 2


class TorchSums(Sums):
    """Moments summed on a device, in float32 over some tokens and then in float64."""

    def __init__(self, columns: int, *, cross: bool, drift: int, device: torch.device) -> None:
        """As `MomentSums`."""
        self._device = device
        kind: Final[Any] = {"dtype": torch.float64, "device": device}
        self._hessian, self._mean = torch.zeros(columns, columns, **kind), torch.zeros(columns, **kind)
        self._cross = torch.zeros(columns, columns, **kind) if cross else None
        self._drift = torch.zeros(columns, drift, **kind) if drift else None
        self._tokens = 0

    @override
    def add(
        self,
        quantized: torch.Tensor,
        original: torch.Tensor | None = None,
        lack: torch.Tensor | None = None,
        token_weights: Float32 | None = None,
    ) -> None:
        for start in range(0, len(quantized), TOKENS_SUMMED):
            part = slice(start, start + TOKENS_SUMMED)
            weighted = quantized[part].T
            if token_weights is not None:
                weighted = weighted * torch.from_numpy(token_weights[part]).to(self._device)
            self._mean += weighted.sum(dim=1, dtype=torch.float64)
            for total, right in ((self._hessian, quantized), (self._cross, original), (self._drift, lack)):
                if total is not None and right is not None:
                    total.add_(weighted @ right[part])
        self._tokens += len(quantized)

    @override
    def moments(self) -> Moments:
        sums = (self._hessian, self._mean, self._cross, self._drift)
        parts = (None if each is None else (each / max(self._tokens, 1)).cpu().numpy() for each in sums)
        hessian, mean, cross, drift = parts
        if hessian is None or mean is None:
            raise ValueError("no sums")
        moments = Moments((hessian + hessian.T) / 2, mean, cross, drift, self._tokens)
        require_finite(moments)
        return moments


@dataclass(frozen=True)
class TorchLoops(Loops):
    """The loops on `device`: all rows of a weight at once."""

    device: torch.device

    @override
    def factor(self, hessian: Float64) -> Float64:
        flipped = self._on(np.ascontiguousarray(hessian[::-1, ::-1]))
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if failed:
            raise ModelError(
                "The second moments of the calibration inputs are not positive definite.",
                "Calibrate with more tokens, or with more damping.",
            )
        identity = torch.eye(len(hessian), dtype=lower.dtype, device=self.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        return np.ascontiguousarray(inverse.flip(0, 1).cpu().numpy())

    @override
    def solve(self, weights: Float32, pull: Float64 | None, drift: Float64 | None, feedback: Float64) -> Float64:
        factor = self._on(feedback)
        lack = torch.zeros(weights.shape, dtype=torch.float64, device=self.device)
        if pull is not None:
            lack += self._on(weights).double() @ self._on(pull)
        if drift is not None:
            lack += self._on(drift).T
        solved: Float64 = (lack @ factor.T @ factor).cpu().numpy()
        return solved

    @override
    def phase_losses(self, weights: Float32, importance: Float32, scales: Float32) -> Float64:
        blocks = self._on(weights).reshape(-1, 1, BLOCK)
        weighed = self._on(np.tile(importance, len(weights)).reshape(-1, 1, BLOCK))
        losses = []
        for scale in scales:
            factors = self._values(E4M3_VALUES)[self._candidates(blocks[:, 0], scale)][..., None] * float(scale)
            difference = blocks - self._values(E2M1_VALUES)[self._codes(blocks, factors)] * factors
            losses.append(float((weighed * difference.square()).sum(dim=2).amin(dim=1).double().sum()))
        return np.array(losses)

    @override
    def round(
        self, target: Float32, hessian: Float32, feedback: Float32, scale: np.float32, passes: int
    ) -> tuple[U8, U8]:
        wanted, matrix = self._on(target), self._on(hessian)
        codes, scales = self._sweep(wanted, self._on(feedback), scale)
        self._descend(codes, scales, wanted, matrix, scale, passes)
        return codes.to(torch.uint8).cpu().numpy(), scales.to(torch.uint8).cpu().numpy()

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
            found: Float32 = (self._on(left) @ self._on(right)).cpu().numpy()
            return found

        kernels.descend_two_sided(codes, scales, target, hessian, covariance, scale, passes, product)

    def _on(self, array: Float32 | Float64) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _values(self, table: Float32) -> torch.Tensor:
        return torch.from_numpy(table).to(self.device)

    def _codes(self, weights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """See `round_reference`."""
        codes = torch.bucketize(weights.abs() * factors.reciprocal(), self._values(MIDPOINTS))
        return torch.where((weights < 0) & (codes > 0), codes + 8, codes)

    def _nearest_scales(self, ratios: torch.Tensor) -> torch.Tensor:
        """The E4M3 codes of ratios, ties to even."""
        ratios = ratios.clamp(float(E4M3_MIN), float(E4M3_MAX)).contiguous()
        halfway = self._values(_HALFWAY.astype(np.float32))
        below, above = torch.bucketize(ratios, halfway), torch.bucketize(ratios, halfway, right=True)
        return torch.where((below != above) & (below % 2 == 1), above, below)

    def _candidates(self, blocks: torch.Tensor, scale: np.float32) -> torch.Tensor:
        """The codes of the scales to try [rows, 14] for blocks [rows, 16]."""
        ratios = blocks.abs().amax(dim=1) / float(np.float32(6) * scale)
        usual = self._nearest_scales(torch.where(ratios == 0, torch.ones_like(ratios), ratios))
        offsets = torch.from_numpy(CANDIDATES).to(self.device)
        return (usual[:, None] + offsets).clamp(SMALLEST_SCALE, LARGEST_SCALE)

    def _sweep(self, target: torch.Tensor, feedback: torch.Tensor, scale: np.float32) -> tuple[torch.Tensor, ...]:
        """See `sweep_reference`."""
        work = target.clone()
        rows, columns = target.shape
        codes = torch.zeros(rows, columns, dtype=torch.int64, device=self.device)
        scales = torch.zeros(rows, columns // BLOCK, dtype=torch.int64, device=self.device)
        inverse, magnitudes, steps = feedback.diagonal().reciprocal(), self._values(E2M1_VALUES), self._steps(scale)
        for first in range(0, columns, BATCH):
            last = min(first + BATCH, columns)
            errors = torch.zeros(rows, last - first, device=self.device)
            for start in range(first, last, BLOCK):
                block = slice(start, start + BLOCK)
                candidates = self._candidates(work[:, block], scale)
                losses = self._losses(work[:, block], feedback[block, block], inverse[block], steps[candidates])
                scales[:, start // BLOCK] = candidates.gather(1, losses.argmin(dim=1, keepdim=True))[:, 0]
                factors = steps[scales[:, start // BLOCK]]
                for j in range(start, start + BLOCK):
                    codes[:, j] = self._codes(work[:, j], factors)
                    error = (work[:, j] - magnitudes[codes[:, j]] * factors) * inverse[j]
                    work[:, j + 1 : last] -= error[:, None] * feedback[j, j + 1 : last]
                    errors[:, j - first] = error
            work[:, last:] -= errors @ feedback[first:last, last:]
        return codes, scales

    def _losses(
        self, block: torch.Tensor, feedback: torch.Tensor, inverse: torch.Tensor, factors: torch.Tensor
    ) -> torch.Tensor:
        """The sum of squared errors [rows, 14] when a block is rounded with feedback under each of `factors`."""
        work, losses = block[:, None, :].repeat(1, factors.shape[1], 1), torch.zeros_like(factors)
        magnitudes = self._values(E2M1_VALUES)
        for j in range(BLOCK):
            error = (work[..., j] - magnitudes[self._codes(work[..., j], factors)] * factors) * inverse[j]
            losses += error * error
            work[..., j + 1 :] -= error[..., None] * feedback[j, j + 1 :]
        return losses

    def _steps(self, scale: np.float32) -> torch.Tensor:
        return self._values(E4M3_VALUES) * float(scale)

    def _descend(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        target: torch.Tensor,
        hessian: torch.Tensor,
        scale: np.float32,
        passes: int,
    ) -> None:
        """See `descend_reference`."""
        steps, magnitudes = self._steps(scale), self._values(E2M1_VALUES)

        def restored(columns: slice) -> torch.Tensor:
            factors = steps[scales[:, columns.start // BLOCK : columns.stop // BLOCK]].repeat_interleave(BLOCK, dim=1)
            return magnitudes[codes[:, columns]] * factors

        difference = restored(slice(0, target.shape[1])) - target
        for _ in range(passes):
            for first in range(0, target.shape[1], BATCH):
                batch = slice(first, min(first + BATCH, target.shape[1]))
                gradient, inside = difference @ hessian[:, batch], hessian[batch, batch]
                for start in range(0, batch.stop - first, BLOCK):
                    self._descend_block(
                        codes, scales, first + start, gradient[:, start:], inside[start:, start:], scale
                    )
                difference[:, batch] = restored(batch) - target[:, batch]

    def _descend_block(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        column: int,
        gradient: torch.Tensor,
        hessian: torch.Tensor,
        scale: np.float32,
    ) -> None:
        """The scale of the block at `column` given its codes, then each code; `gradient` and `hessian` begin with the block."""
        steps, magnitudes = self._steps(scale), self._values(E2M1_VALUES)
        block = slice(column, column + BLOCK)
        chosen, own = scales[:, column // BLOCK], hessian[:BLOCK, :BLOCK]
        values, factors = magnitudes[codes[:, block]], steps[chosen]
        curvature = ((values @ own) * values).sum(dim=1)
        slope = (gradient[:, :BLOCK] * values).sum(dim=1)
        is_used = curvature > 0
        wanted = factors - slope / torch.where(is_used, curvature, torch.ones_like(curvature))
        best = torch.where(is_used, self._nearest_scales(wanted / float(scale)), chosen)
        scales[:, column // BLOCK] = best
        gradient += (values * (steps[best] - factors)[:, None]) @ hessian[:BLOCK]
        factors = steps[best]
        for j in range(BLOCK):
            old = magnitudes[codes[:, column + j]] * factors
            codes[:, column + j] = self._codes(old - gradient[:, j] / hessian[j, j], factors)
            change = magnitudes[codes[:, column + j]] * factors - old
            gradient += change[:, None] * hessian[j]
