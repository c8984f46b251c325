"""The weights stage: every weight of the artefact, dequantized, against the reference's.

A tensor passes if its relative error is within its format's bound and no value or block lost more than rounding can; what
fails is diagnosed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.artefact import Artefact, GgufArtefact
from qtool.checks.diagnosis import Diagnosis
from qtool.checks.findings import Finding, finding, listed_are
from qtool.checks.reference import Reference
from qtool.checks.rounding import Misfits, bound
from qtool.checks.stage import WEIGHTS, Outcome, Stage, TensorError, concluded
from qtool.checks.weight_pairs import TensorPair, WeightError, checkpoint_pairs, gguf_pairs
from qtool.errors import ModelError, QtoolError
from qtool.formats.floats import Float32
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.progress import StageProgress, ignore
from qtool.recipe import parse_recipe
from qtool.workers import worker_pool

_ROUNDING: Final = 1e-5
"""Sums in single precision are exact to this."""


def compare_weights(
    artefact: Artefact, reference: Reference, progress: StageProgress = ignore
) -> tuple[Stage, tuple[TensorError, ...]]:
    """Compare every tensor that both hold, worst first; reads both models whole.

    Raises ModelError if the reference is broken, UsageError if it is quantized.
    """
    started = time.monotonic()
    reference.require_unquantized()
    try:
        if isinstance(artefact, GgufArtefact):
            pairs = gguf_pairs(artefact, reference)
        else:
            pairs = checkpoint_pairs(artefact, reference)
        measured, findings = _measure_all(pairs, artefact.path, progress)
    except ModelError as error:
        return concluded(WEIGHTS, started, [finding("unreadable", artefact.path, problem=str(error))], ""), ()
    findings += Diagnosis(artefact.path, reference, measured, declares_max=_declares_max(artefact)).explain()
    errors = sorted((_tensor_error(each) for each in measured), key=lambda each: -each.relative_error)
    stage = concluded(WEIGHTS, started, findings, _summary(errors))
    if not errors and stage.outcome is Outcome.PASS:
        stage = replace(stage, outcome=Outcome.INCONCLUSIVE)
    return stage, tuple(errors)


def _declares_max(artefact: Artefact) -> bool:
    """Whether the artefact's own recipe says that its block scales are those of the largest values."""
    path = artefact.path / MANIFEST
    if isinstance(artefact, GgufArtefact) or not path.is_file():
        return False
    declared: Any = read_json(path).get("recipe")
    try:
        return parse_recipe(str(declared["text"])).recipe.algorithm == "max"
    except (QtoolError, KeyError, TypeError):
        return False


def _summary(errors: Sequence[TensorError]) -> str:
    if not errors:
        return "No tensor could be compared."
    worst = errors[0]
    return (
        f"{len(errors):,} tensors within what their formats allow; the largest relative error is "
        f"{worst.relative_error:.4f} ({worst.tensor}, {worst.format} allows {worst.bound:.4f})."
    )


def _measure_all(
    pairs: Sequence[TensorPair], artefact: Path, progress: StageProgress
) -> tuple[list[WeightError], list[Finding]]:
    measured: list[WeightError] = []
    unreadable: list[TensorPair] = []
    total, done = sum(pair.elements for pair in pairs), 0
    with worker_pool() as pool:
        for pair, result in zip(pairs, pool.map(_measure, pairs), strict=True):
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


def _measure(pair: TensorPair) -> WeightError | None:
    """How far a tensor is from its source; None if nothing here reads its type."""
    error = power = 0.0
    misfits, is_zero = Misfits(), True
    try:
        for start, expected in pair.expected():
            found, strays = pair.stored.compare(start, expected, pair.source_format)
            with np.errstate(over="ignore", invalid="ignore"):
                error += _squares(found - expected)
            power += _squares(expected)
            misfits += strays
            with np.errstate(invalid="ignore"):
                is_zero = is_zero and not found.any()
    except NotImplementedError:
        return None
    norm = power**0.5
    allowed = bound(pair.stored.format, pair.source_format, pair.elements, norm)
    relative = error**0.5 / norm if norm else error**0.5
    return WeightError(pair, relative, allowed + (_ROUNDING if allowed else 0.0), misfits, is_zero=is_zero and norm > 0)


def _squares(values: Float32) -> float:
    """The sum of squares of a piece, in double precision only where single overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(values @ values)
    return total if np.isfinite(total) else float(values.astype(np.float64) @ values.astype(np.float64))


def _tensor_error(each: WeightError) -> TensorError:
    error = each.relative_error if np.isfinite(each.relative_error) else float(np.finfo(np.float32).max)
    return TensorError(each.pair.name, each.pair.stored.format, error, each.bound)
