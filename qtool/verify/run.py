"""Verification from start to verdict: the cheapest stage that can find a fault comes first, and a broken artefact is not scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from datetime import datetime, timezone
from typing import Final

from qtool.artefact import Artefact, GgufArtefact
from qtool.checks.findings import Finding
from qtool.checks.stage import Outcome, Stage
from qtool.checks.structure_folder import nbytes_of
from qtool.errors import QtoolError
from qtool.manifest import versions
from qtool.progress import StageProgress, duration, ignore
from qtool.scoring.http.engine import DeafError, ScaleError
from qtool.scoring.http.runtime import HttpScorer
from qtool.verify.case import LocatedCase, Role, SharedReference, VerifyOptions, check_output, open_case, prepare_folder
from qtool.verify.collect import NOISE_DTYPE, RoleScores, collect_scores, open_role, role_panels
from qtool.verify.conclude import conclude
from qtool.verify.made import made_of, weights_of
from qtool.verify.report import Report, RunFacts
from qtool.verify.served import reference_causes, refused_faults, served_faults
from qtool.verify.stages import Checked, check_files, check_prompts, note_panels

PACKAGES: Final = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pillow", "xllamacpp")


def run_verification(
    options: VerifyOptions,
    progress: StageProgress = ignore,
    status: Callable[[str], None] = ignore,
    *,
    shared: SharedReference | None = None,
    command: str = "",
) -> Report:
    """Prove, or disprove, that an artefact scores as its reference does; answers are kept in `options.output`.

    `status` gets a line for each stage as it is finished, and how long scoring will take where that is long.
    Verifications of several artefacts pass the same `shared`. `command` is what the user typed, for the report.
    """
    started, began = time.monotonic(), datetime.now(timezone.utc)
    case = _open(options, shared)
    checked = check_files(case, progress)
    scores: dict[Role, RoleScores] = {}
    faults: list[Finding] = []
    shown = _Lines(status)
    shown.show(checked.stages)
    if _may_go_on(options, checked):
        checked = note_panels(case, checked)
        with closing(open_role(case, Role.REFERENCE)) as reference:
            # Before the reference, since llama.cpp loads a GGUF file to tell the tokens of a prompt: so the file is
            # loaded once, and one model is in memory at a time.
            with closing(open_role(case, Role.ARTEFACT)) as artefact:
                try:
                    checked = checked.with_stage(check_prompts(case, reference, artefact))
                    shown.show(checked.stages)
                    if _may_go_on(options, checked):
                        scores[Role.ARTEFACT] = collect_scores(case, Role.ARTEFACT, artefact, progress, status)
                except (ScaleError, DeafError) as error:
                    faults = refused_faults(case, artefact, reference, error)
                if Role.ARTEFACT in scores and isinstance(artefact, HttpScorer):
                    faults = served_faults(case, artefact, scores[Role.ARTEFACT].panels)
            if scores:
                scores[Role.REFERENCE] = collect_scores(case, Role.REFERENCE, reference, progress, status)
                if case.artefact is None and not faults:
                    sides = (scores[role].panels for role in (Role.REFERENCE, Role.ARTEFACT))
                    faults = reference_causes(case, reference, *sides)
        if scores and _has_noise(case):
            with closing(open_role(case, Role.REFERENCE_BF16)) as rounded:
                scores[Role.REFERENCE_BF16] = collect_scores(case, Role.REFERENCE_BF16, rounded, progress, status)
    facts = RunFacts(
        seconds=round(time.monotonic() - started, 3),
        versions=versions(*PACKAGES),
        started=began.isoformat(timespec="seconds"),
        command=command,
        artefact_bytes=_size(case.artefact),
        reference_bytes=_size(case.reference),
        parameters=weights_of(case.reference),
        made=made_of(case.artefact),
    )
    report = conclude(case, checked, scores, facts, faults)
    shown.show(report.stages)
    return report


class _Lines:
    """A line for each stage that ran, once."""

    def __init__(self, status: Callable[[str], None]) -> None:
        self._status = status
        self._shown: set[str] = set()

    def show(self, stages: Sequence[Stage]) -> None:
        """Show those of `stages` that were not shown before."""
        for stage in stages:
            if stage.name not in self._shown and stage.outcome is not Outcome.SKIPPED:
                self._shown.add(stage.name)
                took = duration(stage.seconds)
                self._status(f"{stage.name}: {stage.outcome.value}{f' in {took}' if took else ''}, {stage.summary}")


def _size(artefact: Artefact | None) -> int | None:
    """Bytes of all tensors, projector included; None of a server and of what cannot be read."""
    with suppress(QtoolError):
        if isinstance(artefact, GgufArtefact):
            return sum(model.nbytes for model in artefact.models)
        if artefact is not None:
            return nbytes_of(artefact.checkpoint)
    return None


def _open(options: VerifyOptions, shared: SharedReference | None) -> LocatedCase:
    """Refuse the output before a model is fetched, and clear it only once there is something to put there."""
    if options.output is None:
        return open_case(options, shared)
    check_output(options.output, force=options.force)
    case = open_case(options, shared)
    prepare_folder(options.output, force=options.force)
    return case


def _may_go_on(options: VerifyOptions, checked: Checked) -> bool:
    return not options.structure_only and (options.keep_going or not checked.failed)


def _has_noise(case: LocatedCase) -> bool:
    panels = role_panels(case, Role.REFERENCE_BF16, case.panels, case.options.shard)
    return case.options.dtype != NOISE_DTYPE and any(panel.queries for panel in panels)
