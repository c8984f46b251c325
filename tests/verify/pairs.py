"""Reports of artefacts that answered as they are given: through the code that makes a panel's part of a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qtool.inputs.items import Item
from qtool.inputs.panels import Panel, PanelShard, Query
from qtool.verify.collect import PanelScores
from qtool.verify.compare import compare, panel_report
from qtool.verify.conclude import decisive_margin
from qtool.verify.report import NoiseFloor, Report
from tests.reporting import reports

DOCUMENTS = 6
WIDTH = 8
NOISE = NoiseFloor(dtype="bfloat16", pairs=120, p50=0.01, p95=0.02, p99=0.03, max=0.04)


def panel(queries: int = 40, name: str = "balls") -> Panel:
    made = []
    for number in range(queries):
        documents = tuple(
            Item(f"d{number}-{each}", (f"ball {number} {each}",), label=float(each == number % DOCUMENTS))
            for each in range(DOCUMENTS)
        )
        made.append(Query(Item(f"q{number}", (f"which ball {number}?",)), documents))
    return Panel(name, "CC0-1.0", "text", "binary", f"{sum(name.encode()):064x}", tuple(made))


def reranker(
    name: str,
    answer: Callable[[np.ndarray], np.ndarray],
    *,
    of: Panel | None = None,
    shard: str | None = None,
    limit: int | None = None,
) -> Report:
    """The report of an artefact whose log-odds [queries, documents] are `answer` of the reference's."""
    asked = of or panel()
    truth = np.random.default_rng(7).normal(0, 3, (len(asked.queries), DOCUMENTS))
    kept = slice(None, limit)
    if shard is not None:
        kept = slice(PanelShard.parse(shard).index - 1, None, PanelShard.parse(shard).count)
    part = replace(asked, queries=asked.queries[kept])
    scores = (PanelScores(each[kept].ravel()) for each in (truth, answer(truth)))
    return _report(name, "rerank", part, *scores, shard=shard)


def embedder(name: str, noise: float, shift: float = 0.0, *, seed: int = 0, shard: str | None = None) -> Report:
    """The report of an artefact whose vectors are the reference's, all moved alike and each by noise of its own."""
    asked = panel()
    items = len(asked.queries) * (DOCUMENTS + 1)
    random = np.random.default_rng(7)
    truth = random.normal(0, 1, (items, WIDTH))
    moved = truth + noise * np.random.default_rng(seed).normal(0, 1, truth.shape) + shift
    truth, moved = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (truth, moved))
    step = DOCUMENTS + 1
    places = range(len(asked.queries))
    if shard is not None:
        places = range(PanelShard.parse(shard).index - 1, len(asked.queries), PanelShard.parse(shard).count)
    part = replace(asked, queries=tuple(asked.queries[place] for place in places))
    kept = [place * step + each for place in places for each in range(step)]
    rows = [(n * step, n * step + each) for n in range(len(places)) for each in range(1, step)]
    scores = (PanelScores.of_vectors(each[kept], rows) for each in (truth, moved))
    return _report(name, "embed", part, *scores, shard=shard)


def _report(
    name: str, task: str, part: Panel, reference: PanelScores, artefact: PanelScores, *, shard: str | None
) -> Report:
    measured = compare(part, reference, artefact, decisive_margin(NOISE))
    whole = reports.whole()
    return replace(
        whole,
        task=task,
        artefact=reports.side(name, 1_500_000_000),
        reference=replace(whole.reference, parameters=2_000_000_000),
        settings={**whole.settings, "shard": shard, "task": task},
        panels=(panel_report(part, reference, artefact, measured),),
        noise=NOISE,
    )


def noisy(size: float, shift: float = 0.0, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Scores with normal errors of this size, and a shift."""
    return lambda truth: truth + size * np.random.default_rng(seed).normal(0, 1, truth.shape) + shift
