"""How far a quantized model's answers are from its reference's: raw, without their mean, and that mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch

from tests.bench_quality.beds import Bed

Drift = dict[str, float]


def drift(answers: np.ndarray, reference: np.ndarray) -> Drift:
    """RMS over answers [n, d] of the length of their difference: all of it, its deviation from its mean, and the mean."""
    difference = answers.astype(np.float64) - reference
    mean = difference.mean(axis=0)
    return {"raw": _rms(difference), "centred": _rms(difference - mean), "bias": float(np.linalg.norm(mean))}


def _rms(rows: np.ndarray) -> float:
    return float(np.sqrt((rows**2).sum(axis=1).mean()))


def drifts(given: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, Drift]:
    """The drift of each answer; for log-probabilities the mean KL divergence from the reference."""
    found = {name: drift(given[name], reference[name]) for name in given if name != "log_probabilities"}
    if "log_probabilities" in given:
        true, other = reference["log_probabilities"].astype(np.float64), given["log_probabilities"]
        divergence = float((np.exp(true) * (true - other)).sum(axis=1).mean())
        found["KL"] = {"raw": divergence, "centred": divergence, "bias": 0.0}
    return found


def floor(bed: Bed, evaluation: str, reference: Mapping[str, np.ndarray]) -> dict[str, Drift]:
    """The drift of the bed's own model in bf16."""
    return drifts(bed.answers(copy.deepcopy(bed.model).to(torch.bfloat16), bed.evaluations[evaluation]), reference)
