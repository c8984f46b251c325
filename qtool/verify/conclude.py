"""From scores to a verdict: noise, scores, ranking, gates. Pure: the same scores give the same report, from one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome, Stage, skipped
from qtool.inputs.panels import Panel
from qtool.verify.case import Case, Role
from qtool.verify.collect import NOISE_DTYPE, PanelScores, RoleScores
from qtool.verify.compare import compare, panel_report
from qtool.verify.gates import GateResult, Verdict, evaluate, worst
from qtool.verify.metrics import RANKING, MetricValue, label
from qtool.verify.report import NoiseFloor, Report, Side
from qtool.verify.stages import Checked

NOISE, SCORES, RANKS = "noise", "scores", "ranking"
SCORED = (NOISE, SCORES, RANKS)
"""The stages that need scores, in order."""


def conclude(
    case: Case,
    checked: Checked,
    scores: Mapping[Role, RoleScores],
    seconds: float,
    versions: Mapping[str, str | None],
) -> Report:
    """The report on `case`; without `scores` it is about files alone."""
    noise = _noise(scores)
    margin = decisive_margin(noise) if noise else None
    sides = _sides(case, scores)
    metrics = {panel.name: compare(panel, reference, artefact, margin) for panel, reference, artefact in sides}
    # A shard is not judged: it has too few queries, and the others may make up for them.
    gates = evaluate({} if case.options.shard else case.recipe.recipe.gates, case.task, list(metrics.items()))
    scored = _scored_stages(case, scores, noise, metrics, gates) if metrics else _unscored_stages(checked)
    stages = (*checked.stages, *scored)
    return Report(
        artefact=_side(case.options.artefact, case.artefact_revision, scores.get(Role.ARTEFACT)),
        reference=_side(case.options.reference, case.reference_revision, scores.get(Role.REFERENCE)),
        task=case.task.value,
        task_source=case.task_source,
        recipe=case.recipe.recipe.name,
        settings=case.settings,
        stages=stages,
        panels=tuple(panel_report(panel, one, other, metrics[panel.name]) for panel, one, other in sides),
        gates=gates,
        verdict=_verdict(stages, gates, is_scored=bool(metrics)),
        seconds=seconds,
        versions=versions,
        noise=noise,
        weights=checked.weights,
        rederived=checked.rederived,
    )


def _side(name: str, revision: str | None, scores: RoleScores | None) -> Side:
    if scores:
        return replace(scores.side, revision=revision)
    return Side(name=name, engine="", numbers="", sha256=None, prompt_sha256="", revision=revision)


# The noise floor: how far the reference in bf16 is from itself in float32. A server that computes in bf16 cannot tell
# apart what is closer than this, so no verdict may rest on it.


def noise_floor(dtype: str, reference: Sequence[PanelScores], again: Sequence[PanelScores]) -> NoiseFloor | None:
    """The distances of `again`, on the first pairs of each panel, from `reference` on all of them; None without a pair."""
    deltas = [other.scores - one.scores[: len(other.scores)] for one, other in zip(reference, again, strict=True)]
    distance = np.abs(np.concatenate(deltas))
    if not len(distance):
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(distance, [50, 95, 99]))
    return NoiseFloor(dtype=dtype, pairs=len(distance), p50=p50, p95=p95, p99=p99, max=float(distance.max()))


def decisive_margin(noise: NoiseFloor) -> float:
    """How far apart the reference must score two documents for noise not to exchange them: each may be off by its p99."""
    return 2 * noise.p99


def _noise(scores: Mapping[Role, RoleScores]) -> NoiseFloor | None:
    if Role.REFERENCE_BF16 not in scores:
        return None
    return noise_floor(NOISE_DTYPE, scores[Role.REFERENCE].panels, scores[Role.REFERENCE_BF16].panels)


def _sides(case: Case, scores: Mapping[Role, RoleScores]) -> list[tuple[Panel, PanelScores, PanelScores]]:
    """Each panel with the scores of the reference and of the artefact; nothing where no scores were collected."""
    if Role.ARTEFACT not in scores:
        return []
    return list(zip(case.panels, scores[Role.REFERENCE].panels, scores[Role.ARTEFACT].panels, strict=True))


def _scored_stages(
    case: Case,
    scores: Mapping[Role, RoleScores],
    noise: NoiseFloor | None,
    metrics: Mapping[str, MetricValue],
    gates: Sequence[GateResult],
) -> tuple[Stage, ...]:
    distances = [gate for gate in gates if gate.metric not in RANKING]
    rankings = [gate for gate in gates if gate.metric in RANKING]
    headline = "log_odds_rmse" if case.task is Task.RERANK else "cosine_p1"
    return (
        replace(_noise_stage(case.options.dtype, noise), seconds=_seconds(scores, Role.REFERENCE_BF16)),
        Stage(
            name=SCORES,
            outcome=worst(gate.outcome for gate in distances),
            summary=_summary(headline, metrics),
            seconds=_seconds(scores, Role.REFERENCE, Role.ARTEFACT),
        ),
        Stage(RANKS, worst(gate.outcome for gate in rankings), _summary("kendall_tau", metrics)),
    )


def _seconds(scores: Mapping[Role, RoleScores], *roles: Role) -> float:
    """How long it took to score `roles`; ranking only sorts those scores."""
    return round(sum(scores[role].seconds for role in roles if role in scores), 3)


def _unscored_stages(checked: Checked) -> tuple[Stage, ...]:
    failed = next((stage.name for stage in checked.stages if stage.outcome is Outcome.FAIL), None)
    why = f"Not run: the stage {failed} failed." if failed else "Not run: only the structure was requested."
    return tuple(skipped(name, why) for name in SCORED)


def _noise_stage(dtype: str, noise: NoiseFloor | None) -> Stage:
    if dtype == NOISE_DTYPE:
        return skipped(NOISE, f"Not measured: the reference itself is in {dtype}, so no order counts as decisive.")
    if noise is None:
        return skipped(NOISE, "Not measured, so no order counts as decisive.")
    return Stage(
        NOISE,
        Outcome.PASS,
        f"{noise.dtype} changes the reference's scores by {noise.p50:.4g} (median), {noise.p99:.4g} (p99) and at most "
        f"{noise.max:.4g}, over {noise.pairs} pairs.",
    )


def _verdict(stages: Sequence[Stage], gates: Sequence[GateResult], *, is_scored: bool) -> Verdict:
    outcome = worst(stage.outcome for stage in stages)
    is_judged = any(gate.outcome is not Outcome.SKIPPED for gate in gates)
    if outcome is Outcome.SKIPPED or (outcome is Outcome.PASS and is_scored and not is_judged):
        return Verdict.UNGATED
    return Verdict(outcome.value)


def _summary(metric: str, metrics: Mapping[str, MetricValue]) -> str:
    values = ((panel, found.values.get(metric)) for panel, found in metrics.items())
    shown = ", ".join(f"{panel} {value:.4g}" for panel, value in values if value is not None)
    return f"{label(metric)}: {shown or 'no panel gives it'}."
