"""Verification from start to verdict: structure, weights, prompt, noise, scores, ranking.

Rule: the cheapest stage that can find a fault comes first, and what it finds broken is not scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from qtool.errors import QtoolError
from qtool.manifest import versions
from qtool.progress import StageProgress, ignore
from qtool.verify.case import Case, VerifyOptions, check_output, open_case, prepare_folder
from qtool.verify.collect import NOISE_DTYPE, Role, RoleScores, collect_scores
from qtool.verify.conclude import conclude, noise_panels
from qtool.verify.report import Report
from qtool.verify.stages import Checked, check_files, check_prompts, note_panels

PACKAGES: Final = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pillow", "xllamacpp")


def verify(
    options: VerifyOptions,
    progress: StageProgress = ignore,
    *,
    say: Callable[[str], None] = ignore,
) -> Report:
    """Prove, or disprove, that an artefact scores as its reference does.

    What earlier stages found is told to `say`, a line each, where an error ends the run and there will be no report.
    """
    started = time.monotonic()
    case = _begin(options)
    checked = check_files(case, progress)
    collected: dict[Role, RoleScores] = {}
    try:
        if _may_go_on(options, checked):
            checked = note_panels(case, checked)
            checked = checked.with_stage(check_prompts(case))
        if _may_go_on(options, checked):
            collected = _hear_all(case, progress)
    except QtoolError:
        for stage in checked.stages:
            say(f"{stage.name}: {stage.outcome.value}, {stage.summary}")
        raise
    return conclude(case, checked, collected, round(time.monotonic() - started, 3), versions(*PACKAGES))


def _begin(options: VerifyOptions) -> Case:
    """Refuse the output before a model is fetched, and clear it only once there is something to put there."""
    if options.output is None:
        return open_case(options)
    check_output(options.output, force=options.force)
    case = open_case(options)
    prepare_folder(options.output, force=options.force)
    return case


def _may_go_on(options: VerifyOptions, checked: Checked) -> bool:
    return not options.structure_only and (options.keep_going or not checked.failed)


def _hear_all(case: Case, progress: StageProgress) -> dict[Role, RoleScores]:
    collected = {Role.REFERENCE: collect_scores(case, Role.REFERENCE, case.panels, progress)}
    noise = noise_panels(case.panels, case.options.noise_queries, case.options.shard)
    if case.options.dtype != NOISE_DTYPE and any(panel.queries for panel in noise):
        collected[Role.NOISE] = collect_scores(case, Role.NOISE, noise, progress)
    collected[Role.ARTEFACT] = collect_scores(case, Role.ARTEFACT, case.panels, progress)
    return collected
