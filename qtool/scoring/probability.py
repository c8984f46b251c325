"""Probabilities as engines give them, and the log-odds that runtimes are compared in.

Rule: a probability that a float32 has rounded to 0 or 1 still has finite log-odds.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

_SMALLEST: Final = float(np.finfo(np.float32).smallest_subnormal)
_LARGEST: Final = 1 - 2.0**-25


def log_odds(probability: float) -> float:
    """Log p/(1-p), finite where a float32 has rounded to 0 or 1."""
    kept = min(max(probability, _SMALLEST), _LARGEST)
    return math.log(kept) - math.log1p(-kept)


def sigmoid(score: float) -> float:
    """The probability of these log-odds, to the last digits however small."""
    small = math.exp(-abs(score))
    return (1.0 if score >= 0 else small) / (1.0 + small)
