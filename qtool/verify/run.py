"""Verification from start to verdict: the cheapest stage that can find a fault comes first, and a broken artefact is not scored."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Final

from qtool.errors import QtoolError
from qtool.manifest import versions
from qtool.progress import StageProgress, ignore
from qtool.verify.case import LocatedCase, Role, SharedReference, VerifyOptions, check_output, open_case, prepare_folder
from qtool.verify.collect import NOISE_DTYPE, RoleScores, collect_scores, open_role, role_panels
from qtool.verify.conclude import conclude
from qtool.verify.report import Report
from qtool.verify.stages import Checked, check_files, check_prompts, note_panels

PACKAGES: Final = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pillow", "xllamacpp")


def run_verification(
    options: VerifyOptions,
    progress: StageProgress = ignore,
    status: Callable[[str], None] = ignore,
    shared: SharedReference | None = None,
) -> Report:
    """Prove, or disprove, that an artefact scores as its reference does; answers are kept in `options.output`.

    Where an error ends the run, and so no report is written, `status` gets a line for each stage that was finished.
    Verifications of several artefacts pass the same `shared`.
    """
    started = time.monotonic()
    case = _open(options, shared)
    checked = check_files(case, progress)
    scores: dict[Role, RoleScores] = {}
    try:
        if _may_go_on(options, checked):
            checked = note_panels(case, checked)
            with closing(open_role(case, Role.REFERENCE)) as reference:
                # Before the reference, since llama.cpp loads a GGUF file to tell the tokens of a prompt: so the file is
                # loaded once, and one model is in memory at a time.
                with closing(open_role(case, Role.ARTEFACT)) as artefact:
                    checked = checked.with_stage(check_prompts(case, reference, artefact))
                    if _may_go_on(options, checked):
                        scores[Role.ARTEFACT] = collect_scores(case, Role.ARTEFACT, artefact, progress)
                if scores:
                    scores[Role.REFERENCE] = collect_scores(case, Role.REFERENCE, reference, progress)
            if scores and _has_noise(case):
                with closing(open_role(case, Role.REFERENCE_BF16)) as rounded:
                    scores[Role.REFERENCE_BF16] = collect_scores(case, Role.REFERENCE_BF16, rounded, progress)
    except QtoolError:
        for stage in checked.stages:
            status(f"{stage.name}: {stage.outcome.value}, {stage.summary}")
        raise
    return conclude(case, checked, scores, round(time.monotonic() - started, 3), versions(*PACKAGES))


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
