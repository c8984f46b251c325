"""The noise floor: how far the reference in bf16 is from itself in fp32.

Rule: what is closer than this, no server that computes in bf16 can tell apart, so no verdict may rest on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtool.inputs.panels import Panel
from qtool.inputs.shards import Shard
from qtool.verification.answers import Answers
from qtool.verification.report import NoiseFloor


def noise_panels(panels: Sequence[Panel], queries: int, shard: Shard | None = None) -> list[Panel]:
    """Those of `panels`, or of a shard of them, that are among the first `queries` of each: they are asked twice."""
    share = queries if shard is None else len(range(shard.index - 1, queries, shard.count))
    return [panel.first(share) for panel in panels]


def noise_floor(dtype: str, reference: Sequence[Answers], noisy: Sequence[Answers]) -> NoiseFloor | None:
    """What `noisy` answered to the first pairs of each panel, against what `reference` answered to all; None without any."""
    deltas = [again.scores - first.scores[: len(again.scores)] for first, again in zip(reference, noisy, strict=True)]
    distance = np.abs(np.concatenate(deltas))
    if not len(distance):
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(distance, [50, 95, 99]))
    return NoiseFloor(dtype, len(distance), p50, p95, p99, float(distance.max()))


def decisive_margin(noise: NoiseFloor) -> float:
    """How far apart two documents must be in the reference for noise not to exchange them: each may be off by its p99."""
    return 2 * noise.p99
