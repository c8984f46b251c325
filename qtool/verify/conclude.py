"""From answers to a verdict: noise, scores, ranking, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome, Stage
from qtool.inputs.panels import Panel, PanelShard
from qtool.verify.case import Case
from qtool.verify.collect import NOISE_DTYPE, Answers, Role, RoleScores
from qtool.verify.compare import compare, panel_report
from qtool.verify.gates import GateResult, Verdict, evaluate, worst
from qtool.verify.metrics import RANKING, MetricValue
from qtool.verify.report import NoiseFloor, PanelReport, Report, Side
from qtool.verify.stages import Checked

# The noise floor: how far the reference in bf16 is from itself in fp32. What is closer than this, no server that
# computes in bf16 can tell apart, so no verdict may rest on it.


def noise_panels(panels: Sequence[Panel], queries: int, shard: PanelShard | None = None) -> list[Panel]:
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


# From answers to a verdict: noise, scores, ranking, gates. Pure; the same answers give the same report, whether one
# run gathered them or several.


SCORED = ("noise", "scores", "ranking")
"""The stages that need answers, in order."""


def conclude(
    case: Case,
    checked: Checked,
    collected: Mapping[Role, RoleScores],
    seconds: float,
    versions: Mapping[str, str | None],
) -> Report:
    """The report on `case`; without answers in `collected` it is about files alone."""
    noise = _noise(collected)
    measured = _measured(case, collected, noise)
    # A shard is not judged: its queries are too few, and the others may make up for them.
    wanted = {} if case.options.shard else case.recipe.recipe.gates
    gates = evaluate(wanted, case.task, list(measured.items()))
    stages = (
        *checked.stages,
        *(_scored_stages(case, collected, noise, measured, gates) if measured else _unscored(checked)),
    )
    return Report(
        artefact=_side(case.options.artefact, collected.get(Role.ARTEFACT)),
        reference=_side(case.options.reference, collected.get(Role.REFERENCE)),
        task=case.task.value,
        task_source=case.task_source,
        recipe=case.recipe.recipe.name,
        settings=case.settings,
        stages=stages,
        panels=_panel_reports(case, collected, measured),
        gates=gates,
        verdict=_verdict(stages, gates, is_scored=bool(measured)),
        seconds=seconds,
        versions=versions,
        noise=noise,
        weights=checked.weights,
        rederived=checked.rederived,
    )


def _side(name: str, collected: RoleScores | None) -> Side:
    return collected.side if collected else Side(name, "", "", None, "")


def _noise(collected: Mapping[Role, RoleScores]) -> NoiseFloor | None:
    if Role.NOISE not in collected:
        return None
    return noise_floor(NOISE_DTYPE, collected[Role.REFERENCE].answers, collected[Role.NOISE].answers)


def _measured(case: Case, collected: Mapping[Role, RoleScores], noise: NoiseFloor | None) -> dict[str, MetricValue]:
    if Role.ARTEFACT not in collected:
        return {}
    margin = decisive_margin(noise) if noise else None
    return {
        panel.name: compare(panel, one, other, margin)
        for panel, one, other in zip(*_answered(case, collected), strict=True)
    }


def _panel_reports(
    case: Case, collected: Mapping[Role, RoleScores], measured: Mapping[str, MetricValue]
) -> tuple[PanelReport, ...]:
    if not measured:
        return ()
    return tuple(
        panel_report(panel, one, other, measured[panel.name])
        for panel, one, other in zip(*_answered(case, collected), strict=True)
    )


def _answered(
    case: Case, collected: Mapping[Role, RoleScores]
) -> tuple[Sequence[Panel], Sequence[Answers], Sequence[Answers]]:
    return case.panels, collected[Role.REFERENCE].answers, collected[Role.ARTEFACT].answers


def _scored_stages(
    case: Case,
    collected: Mapping[Role, RoleScores],
    noise: NoiseFloor | None,
    measured: Mapping[str, MetricValue],
    gates: Sequence[GateResult],
) -> tuple[Stage, ...]:
    distances = [gate for gate in gates if gate.metric not in RANKING]
    rankings = [gate for gate in gates if gate.metric in RANKING]
    return (
        replace(_noise_stage(case.options.dtype, noise), seconds=_seconds(collected, Role.NOISE)),
        Stage(
            "scores",
            worst(gate.outcome for gate in distances),
            _summary(_headline(case.task), measured),
            seconds=_seconds(collected, Role.REFERENCE, Role.ARTEFACT),
        ),
        Stage("ranking", worst(gate.outcome for gate in rankings), _summary("kendall_tau", measured)),
    )


def _seconds(collected: Mapping[Role, RoleScores], *roles: Role) -> float:
    """How long it took to ask them; ranking only sorts what they said."""
    return round(sum(collected[role].seconds for role in roles if role in collected), 3)


def _unscored(checked: Checked) -> tuple[Stage, ...]:
    failed = next((stage.name for stage in checked.stages if stage.outcome is Outcome.FAIL), None)
    why = f"not run: the stage {failed} failed" if failed else "not run: only the structure was asked for"
    return tuple(Stage(name, Outcome.SKIPPED, why) for name in SCORED)


def _noise_stage(dtype: str, noise: NoiseFloor | None) -> Stage:
    if dtype == NOISE_DTYPE:
        return Stage("noise", Outcome.SKIPPED, f"the reference is in {dtype} itself, so no order counts as decisive")
    if noise is None:
        return Stage("noise", Outcome.SKIPPED, "not measured, so no order counts as decisive")
    return Stage(
        "noise",
        Outcome.PASS,
        f"{noise.dtype} moves the reference's own scores by {noise.p50:.4g} (median), {noise.p99:.4g} (p99), "
        f"{noise.max:.4g} at most, over {noise.pairs} pairs",
    )


def _verdict(stages: Sequence[Stage], gates: Sequence[GateResult], *, is_scored: bool) -> Verdict:
    outcome = worst(stage.outcome for stage in stages)
    is_judged = any(gate.outcome is not Outcome.SKIPPED for gate in gates)
    if outcome is Outcome.SKIPPED or (outcome is Outcome.PASS and is_scored and not is_judged):
        return Verdict.UNGATED
    return Verdict(outcome.value)


def _headline(task: Task) -> str:
    return "log_odds_rmse" if task is Task.RERANK else "cosine_p1"


def _summary(metric: str, measured: Mapping[str, MetricValue]) -> str:
    values = ((panel, found.values.get(metric)) for panel, found in measured.items())
    shown = ", ".join(f"{panel} {value:.4g}" for panel, value in values if value is not None)
    return f"{metric}: {shown or 'none of the panels gives it'}"
