"""The weights stage: every weight of the artefact, dequantized, against the reference's.

A tensor passes if its relative error is within its format's bound and no value or block lost more than rounding can; what
fails is diagnosed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from qtool.artefact import Artefact, GgufArtefact
from qtool.checks.declared import Declared, RecordedWeight, declared
from qtool.checks.diagnosis import Diagnosis, is_compensated
from qtool.checks.findings import Finding, finding, listed_are
from qtool.checks.fitted import FITTED_BOUND, FittedErrors, Proof, Standing, row_bands
from qtool.checks.reference import Reference
from qtool.checks.rounding import Misfits, bound
from qtool.checks.stage import WEIGHTS, Outcome, Stage, TensorError, concluded
from qtool.checks.weight_pairs import Nvfp4Store, TensorPair, WeightError, checkpoint_pairs, gguf_pairs
from qtool.errors import ModelError
from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4_checksums import checksums_of, float_checksum
from qtool.progress import StageProgress, ignore
from qtool.workers import worker_pool

_ROUNDING: Final = 1e-5
"""Sums in single precision are exact to this."""
_ALLOWED: Final = 1.25
"""What a weight may be off, in parts of the recorded error, before it is looked at as another one."""


def compare_weights(
    artefact: Artefact, reference: Reference, progress: StageProgress = ignore
) -> tuple[Stage, tuple[TensorError, ...]]:
    """Compare every tensor that both hold, worst first; reads both models whole.

    Raises ModelError if the reference is broken, UsageError if it is quantized.
    """
    started = time.monotonic()
    reference.require_unquantized()
    known = declared(artefact)
    try:
        if isinstance(artefact, GgufArtefact):
            pairs = gguf_pairs(artefact, reference)
        else:
            pairs = checkpoint_pairs(artefact, reference)
        measured, findings = _measure_all(pairs, known, artefact.path, progress)
        measured = _judged(measured, known)
    except ModelError as error:
        return concluded(WEIGHTS, started, [finding("unreadable", artefact.path, problem=str(error))], ""), ()
    findings += Diagnosis(artefact.path, reference, measured, known.algorithm).explain()
    errors = sorted((_tensor_error(each) for each in measured), key=lambda each: -each.relative_error)
    stage = concluded(WEIGHTS, started, findings, _summary(errors, measured))
    if not errors and stage.outcome is Outcome.PASS:
        stage = replace(stage, outcome=Outcome.INCONCLUSIVE)
    return stage, tuple(errors)


def _summary(errors: Sequence[TensorError], measured: Sequence[WeightError]) -> str:
    if not errors:
        return "No tensor could be compared."
    worst = errors[0]
    proven = sum(each.proof is not None and each.is_sound and not each.is_fitted for each in measured)
    fitted = f", {proven:,} of them fitted to data and exactly as qtool.json records" if proven else ""
    return (
        f"{len(errors):,} tensors within what their formats allow{fitted}; the largest relative error is "
        f"{worst.relative_error:.4f} ({worst.tensor}, {worst.format} allows {worst.bound:.4f})."
    )


def _measure_all(
    pairs: Sequence[TensorPair], known: Declared, artefact: Path, progress: StageProgress
) -> tuple[list[WeightError], list[Finding]]:
    measured: list[WeightError] = []
    unreadable: list[TensorPair] = []
    total, done = sum(pair.elements for pair in pairs), 0
    with worker_pool() as pool:
        for pair, result in zip(pairs, pool.map(partial(_measure, known=known), pairs), strict=True):
            if result is None:
                unreadable.append(pair)
            else:
                measured.append(result)
            done += pair.elements
            progress(WEIGHTS, done, total)
    if not unreadable:
        return measured, []
    names = listed_are([pair.name for pair in unreadable])
    reason = f"qtool cannot decode {unreadable[0].stored.format}"
    return measured, [finding("weights-not-compared", artefact, tensors=names, reason=reason)]


def _measure(pair: TensorPair, known: Declared) -> WeightError | None:
    """How far a tensor is from its source; None if nothing here reads its type."""
    error = power = 0.0
    misfits, is_zero = Misfits(), True
    store = pair.stored
    may_be_fitted = (
        isinstance(store, Nvfp4Store) and len(pair.shape) == 2 and (known.algorithm is None or known.is_calibrated)
    )
    blocks = FittedErrors(*pair.shape) if may_be_fitted else None
    recorded = known.weights.get(pair.name) if known.is_calibrated and blocks is not None else None
    source_crc32 = 0
    try:
        for start, expected in pair.expected():
            found, strays = store.compare(start, expected, pair.source_format)
            with np.errstate(over="ignore", invalid="ignore"):
                error += _squares(found - expected)
            power += _squares(expected)
            misfits += strays
            with np.errstate(invalid="ignore"):
                is_zero = is_zero and not found.any()
            if blocks is not None:
                blocks.add(start, expected, found)
            if recorded is not None:
                source_crc32 = float_checksum(expected, source_crc32)
    except NotImplementedError:
        return None
    norm = power**0.5
    allowed = bound(store.format, pair.source_format, pair.elements, norm)
    relative = error**0.5 / norm if norm else error**0.5
    is_zero = is_zero and norm > 0
    if blocks is None or not isinstance(store, Nvfp4Store):
        return WeightError(pair, relative, allowed + (_ROUNDING if allowed else 0.0), misfits, is_zero=is_zero)
    each = WeightError(
        pair,
        relative,
        allowed + _ROUNDING,
        misfits,
        is_zero=is_zero,
        worst_row=blocks.worst_row,
        far=blocks.far,
        zero_rows=blocks.zero_rows,
    )
    if recorded is None or recorded.shape != pair.shape:
        return each
    proof = _proof(pair, store, recorded, source_crc32, blocks.relative_error)
    return replace(each, proof=proof, bound=max(each.bound, _ALLOWED * proof.recorded.relative_error))


def _judged(measured: Sequence[WeightError], known: Declared) -> list[WeightError]:
    """The tensors, of which those that were fitted to data and have no record that can be used are held to a bound.

    Fitting takes few tensors far: where most are further off than rounding to nearest may be, none gets the wider bound.
    """
    packed = [each for each in measured if isinstance(each.pair.stored, Nvfp4Store)]
    if not packed:
        return list(measured)
    is_fitted = known.is_calibrated or (
        known.algorithm is None and sum(is_compensated(each) for each in packed) > len(packed) / 2
    )
    middle = float(np.median([each.relative_error for each in packed]))
    wide = FITTED_BOUND if middle <= bound("NVFP4", "BF16", 1, 1.0) else 0.0

    def judge(each: WeightError) -> WeightError:
        is_proven = each.proof is not None and each.proof.standing is not Standing.EDITED
        if not is_fitted or is_proven or each not in packed or not is_compensated(each):
            return each
        return replace(each, is_fitted=True, bound=max(each.bound, wide))

    return [judge(each) for each in measured]


def _proof(
    pair: TensorPair, store: Nvfp4Store, recorded: RecordedWeight, source_crc32: int, relative_error: float
) -> Proof:
    rows, columns = pair.shape
    scale = np.float32(0)

    def bands() -> Iterator[tuple[U8, U8]]:
        nonlocal scale
        for first, last in row_bands(rows):
            blocks = store.blocks(first * columns, (last - first) * columns)
            scale = blocks.scale
            yield blocks.packed.reshape(last - first, -1), blocks.block_scales.reshape(last - first, -1)

    found = checksums_of(bands())
    return Proof(recorded, (rows, columns), found, scale, source_crc32, relative_error)


def _squares(values: Float32) -> float:
    """The sum of squares of a piece, in double precision only where single overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(values @ values)
    return total if np.isfinite(total) else float(values.astype(np.float64) @ values.astype(np.float64))


def _tensor_error(each: WeightError) -> TensorError:
    error = each.relative_error if np.isfinite(each.relative_error) else float(np.finfo(np.float32).max)
    return TensorError(each.pair.name, each.pair.stored.format, error, each.bound)
