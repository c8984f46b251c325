"""Measures recipes as a verification would: quantizes into a scratch folder and scores the questions that nothing was fitted to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.calibration.data import questions
from qtool.calibration.quantize import quantize_calibrated
from qtool.errors import UsageError
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.progress import StageProgress
from qtool.recipe import parse_recipe
from qtool.storage.hub import Source

if TYPE_CHECKING:
    from qtool.inputs.panels import Panel

_EVERY: Final = 4
FEWEST: Final = 8
"""Queries: a quarter of fewer says nothing."""


@dataclass(frozen=True)
class Measured:
    """A model that answered the held-out questions: how far from the reference, and its bits per weight of the linears.

    `raw` is the root mean square of the difference (of vectors, of its length), `centred` that without the mean
    difference, `bias` the size of that mean.
    """

    name: str
    bits: float
    raw: float
    centred: float
    bias: float


def divided(data: Panel) -> tuple[Panel, Panel]:
    """Every fourth query is held out: the queries that are fitted to, and those. Raises UsageError for too few."""
    if len(data.queries) < FEWEST:
        raise UsageError(
            f"{data.name} has {len(data.queries)} queries; tuning needs at least {FEWEST}, a quarter of which it holds out.",
            "Pass more --data, or a larger --limit.",
        )
    fitted = tuple(query for number, query in enumerate(data.queries, start=1) if number % _EVERY)
    return replace(data, queries=fitted), replace(data, queries=data.queries[_EVERY - 1 :: _EVERY])


@dataclass(frozen=True)
class HeldOut:
    """The reference `opened`, the queries of `panel` that it and its quantizations are asked, and those of `fitted`.

    `options` quantize; their recipe and output are replaced.
    """

    opened: CheckpointArtefact
    fitted: Panel
    panel: Panel
    options: QuantizeOptions
    scratch: Path
    progress: StageProgress

    def measure(self, name: str, recipe: str, bits: float) -> tuple[Measured, tuple[str, ...]]:
        """Quantize by the text of a recipe, and ask; also the warnings about the data."""
        path, output = self.scratch / "recipe.yaml", self.scratch / "artefact"
        path.write_text(recipe, encoding="utf-8")
        options = replace(self.options, recipe=str(path), output=output)
        warnings: tuple[str, ...] = ()
        if parse_recipe(recipe, name).recipe.calibration is None:
            quantize(replace(options, data=(), effort=None), partial(self.progress, f"{name}: writing"))
        else:
            summary = quantize_calibrated(options, partial(self._advance, name), self.fitted)
            warnings = summary.calibration.warnings if summary.calibration else ()
        try:
            answers = self._answers(name, CheckpointArtefact(Source(output, name), self.options.task))
        finally:
            shutil.rmtree(output)
        return self._measured(name, bits, answers), warnings

    def _advance(self, name: str, stage: str, done: int, total: int) -> None:
        self.progress(f"{name}: {stage}", done, total)

    def floor(self, bits: float) -> Measured:
        """The reference in bfloat16: differences that every engine makes."""
        return self._measured("bf16", bits, self._answers("bf16", self.opened, "bfloat16"))

    @cached_property
    def _reference(self) -> NDArray[np.float64]:
        return self._answers("reference", self.opened)

    def _answers(self, name: str, artefact: CheckpointArtefact, dtype: str = "float32") -> NDArray[np.float64]:
        from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer

        memory = self.options.memory
        scorer = open_scorer(artefact, ScorerOptions(self.options.task, dtype, "cpu", memory=memory))
        asked = questions(self.panel, scorer.task, scorer.query_instruction)
        done = 0

        def answered(*_: object) -> None:
            nonlocal done
            done += 1
            self.progress(f"{name}: scoring", done, len(asked))

        if scorer.task is Task.RERANK:
            return np.asarray(scorer.score(asked, answered), np.float64)[:, None]  # type: ignore[arg-type]  # pairs
        return scorer.embed(asked, answered).astype(np.float64)  # type: ignore[arg-type]  # items

    def _measured(self, name: str, bits: float, answers: NDArray[np.float64]) -> Measured:
        difference = answers - self._reference
        mean = difference.mean(axis=0)
        raw, centred = (float(np.sqrt((each**2).sum(axis=1).mean())) for each in (difference, difference - mean))
        return Measured(name, bits, raw, centred, float(np.linalg.norm(mean)))
