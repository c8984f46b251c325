"""The stages that need no scores: structure, weights, rederivation, prompt.

Rule: here is decided which of them run and in what order; what they look at is their own affair.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Final

from qtool.arch.spec import Task
from qtool.checks.prompts import compare_prompts
from qtool.checks.rederive import rederive
from qtool.checks.stage import PANELS, STRUCTURE, Outcome, RederivedFile, Stage, TensorError, skipped
from qtool.checks.structure import check_structure
from qtool.checks.weights import compare_weights
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import Panel
from qtool.progress import StageProgress
from qtool.verify.case import Case
from qtool.verify.collect import Role, open_role

_QUESTIONS: Final = 4
"""Of each panel: a prompt that is wrong is wrong everywhere."""


@dataclass(frozen=True)
class Checked:
    """What was found without asking for a score."""

    stages: tuple[Stage, ...] = ()
    weights: tuple[TensorError, ...] = ()
    rederived: tuple[RederivedFile, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether any stage did."""
        return any(stage.outcome is Outcome.FAIL for stage in self.stages)

    def with_stage(self, stage: Stage) -> Checked:
        """The same with one stage more."""
        return replace(self, stages=(*self.stages, stage))


def check_files(case: Case, progress: StageProgress) -> Checked:
    """Structure, and what was asked for of weights and rederivation; a server shows no files."""
    if case.artefact is None:
        return Checked((skipped(STRUCTURE, "a server shows no files"),))
    options, artefact = case.options, case.artefact
    checked = Checked((check_structure(artefact, case.reference),))
    if options.weights and (options.keep_going or not checked.failed):
        stage, errors = compare_weights(artefact, case.reference, progress)
        checked = replace(checked.with_stage(stage), weights=errors)
    if options.rederive and (options.keep_going or not checked.failed):
        with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
            stage, files = rederive(artefact, case.reference, Path(folder))
        checked = replace(checked.with_stage(stage), rederived=files)
    return checked


def note_panels(case: Case, checked: Checked) -> Checked:
    """What was checked, and which of the built-in panels nobody is asked, if any: of those nothing is proven."""
    return checked.with_stage(Stage(PANELS, Outcome.INCONCLUSIVE, case.left_out)) if case.left_out else checked


def check_prompts(case: Case) -> Stage:
    """What both sides read for the first questions of each panel."""
    questions = [question for panel in case.panels for question in islice(_questions(case, panel), _QUESTIONS)]
    with closing(open_role(case, Role.REFERENCE)) as reference, closing(open_role(case, Role.ARTEFACT)) as artefact:
        return compare_prompts(reference, artefact, questions, case.reference, case.options.artefact)


def _questions(case: Case, panel: Panel) -> Iterable[Pair | Item]:
    """Pairs; of an embedder documents and, each time it changes, the query, which alone has an instruction."""
    if case.task is Task.RERANK:
        return panel.pairs
    return chain.from_iterable(
        (query.item.with_instruction(query.item.instruction or case.query_instruction), *query.documents)
        for query in panel.queries
    )
