"""The stages that need no scores: structure, weights, rederive, panels, prompt."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Final

from qtool.arch.spec import Task
from qtool.artefact import Artefact
from qtool.calibration.quantize import quantize_by_recipe
from qtool.checks.calibrated import calibration_findings
from qtool.checks.prompts import compare_prompts
from qtool.checks.rederive import rederive
from qtool.checks.stage import (
    PANELS,
    REDERIVE,
    STRUCTURE,
    Outcome,
    RederivedFile,
    Stage,
    TensorError,
    concluded,
    skipped,
)
from qtool.checks.structure import check_structure
from qtool.checks.weights import compare_weights
from qtool.inputs.builtin import is_dataset
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import Panel
from qtool.progress import StageProgress
from qtool.scoring.scorer import Scorer
from qtool.verify.case import LocatedCase

_QUESTIONS: Final = 4
"""Asked of each panel: a prompt that is wrong is wrong everywhere."""


@dataclass(frozen=True)
class Checked:
    """The stages so far, with the tables of the weights and rederive stages."""

    stages: tuple[Stage, ...] = ()
    weights: tuple[TensorError, ...] = ()
    rederived: tuple[RederivedFile, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether any stage failed."""
        return any(stage.outcome is Outcome.FAIL for stage in self.stages)

    def with_stage(self, stage: Stage) -> Checked:
        """With one stage more."""
        return replace(self, stages=(*self.stages, stage))


def check_files(case: LocatedCase, progress: StageProgress) -> Checked:
    """The structure stage and, where they were requested, weights and rederive; a server shows no files."""
    if case.artefact is None:
        return Checked((skipped(STRUCTURE, "A server shows no files."),))
    options, artefact = case.options, case.artefact
    structure = _structure(case, artefact)
    said = calibration_findings(artefact, case.panels)
    checked = Checked((replace(structure, findings=(*structure.findings, *said)),))
    if options.weights and (options.keep_going or not checked.failed):
        stage, errors = compare_weights(artefact, case.reference, progress)
        checked = replace(checked.with_stage(stage), weights=errors)
    if options.rederive and (options.keep_going or not checked.failed):
        with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
            stage, files = rederive(
                artefact,
                case.reference,
                Path(folder),
                partial(progress, REDERIVE),
                lambda wanted, shown: quantize_by_recipe(replace(wanted, memory=options.memory), shown),
                (*options.data, *filter(is_dataset, options.panels)),
            )
        checked = replace(checked.with_stage(stage), rederived=files)
    return checked


def _structure(case: LocatedCase, artefact: Artefact) -> Stage:
    """The structure stage; of another family nothing else is compared, and the reference need not be readable as it."""
    started = time.monotonic()
    if any(each.code == "other-architecture" for each in case.mismatch):
        return concluded(STRUCTURE, started, case.mismatch, "")
    stage = check_structure(artefact, case.reference)
    if not case.mismatch:
        return stage
    return concluded(STRUCTURE, started, (*case.mismatch, *stage.findings), "")


def note_panels(case: LocatedCase, checked: Checked) -> Checked:
    """`checked` with the panels stage where panels prove nothing: those left out, and coloured shapes for a real model."""
    reasons = [case.left_out] if case.left_out else []
    if case.undecided:
        reasons.append(
            f"{', '.join(case.undecided)}: coloured shapes, made for qtool's demo models, decide nothing about this model. "
            "Pass --panel YOUR.jsonl, or leave out --panel for real texts."
        )
    return checked.with_stage(Stage(PANELS, Outcome.INCONCLUSIVE, " ".join(reasons))) if reasons else checked


def check_prompts(case: LocatedCase, reference: Scorer, artefact: Scorer) -> Stage:
    """The prompt stage: whether both models read the same for the first questions of each panel."""
    questions = [question for panel in case.panels for question in islice(_questions(case, panel), _QUESTIONS)]
    return compare_prompts(reference, artefact, questions, case.reference, case.options.artefact)


def _questions(case: LocatedCase, panel: Panel) -> Iterable[Pair | Item]:
    """The pairs; for an embedder each query, which alone has an instruction, and its documents."""
    if case.task is Task.RERANK:
        return panel.pairs
    return chain.from_iterable(
        (query.item.with_instruction(query.item.instruction or case.query_instruction), *query.documents)
        for query in panel.queries
    )
