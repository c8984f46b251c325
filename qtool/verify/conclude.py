"""From scores to a verdict: noise, scores, ranking, gates. Pure: the same scores give the same report, from one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qtool.arch.spec import Task
from qtool.checks.findings import Finding, Severity
from qtool.checks.stage import Outcome, Stage, counted, skipped
from qtool.inputs.panels import Panel
from qtool.scoring.http.detect import ServerKind
from qtool.verify.case import Case, Role
from qtool.verify.collect import NOISE_DTYPE, PanelScores, RoleScores
from qtool.verify.compare import compare, panel_report
from qtool.verify.faults import score_faults
from qtool.verify.gates import GateResult, Verdict, evaluate, worst
from qtool.verify.metrics import RANKING, MetricValue
from qtool.verify.report import NoiseFloor, Report, RunFacts, Side
from qtool.verify.stages import Checked

NOISE, SCORES, RANKS = "noise", "scores", "ranking"
SCORED = (NOISE, SCORES, RANKS)
"""The stages that need scores, in order."""


def conclude(
    case: Case,
    checked: Checked,
    scores: Mapping[Role, RoleScores],
    facts: RunFacts,
    faults: Sequence[Finding] = (),
) -> Report:
    """The report on `case`; without `scores` it is about files alone. `faults` are what the runtime was found to do."""
    noise = _noise(scores)
    margin = decisive_margin(noise) if noise else None
    sides = _sides(case, scores)
    metrics = {panel.name: compare(panel, reference, artefact, margin) for panel, reference, artefact in sides}
    # A shard is not judged: it has too few queries, and the others may make up for them.
    faults = _all_faults(case.options.artefact, faults, sides, scores)
    gates = evaluate({} if case.options.shard else case.recipe.recipe.gates, case.task, list(metrics.items()))
    gates = tuple(_undecided(gate) if gate.panel in case.undecided else gate for gate in gates)
    if metrics:
        scored = _scored_stages(case, scores, noise, metrics, gates, faults)
    else:
        scored = _unscored_stages(checked, faults)
    stages = (*checked.stages, *scored)
    return Report(
        artefact=_side(case.options.artefact, case.artefact_revision, scores.get(Role.ARTEFACT), facts.artefact_bytes),
        reference=replace(
            _side(case.options.reference, case.reference_revision, scores.get(Role.REFERENCE), facts.reference_bytes),
            parameters=facts.parameters,
        ),
        task=case.task.value,
        task_source=case.task_source,
        recipe=case.recipe.recipe.name,
        settings=case.settings,
        stages=stages,
        panels=tuple(panel_report(panel, one, other, metrics[panel.name]) for panel, one, other in sides),
        gates=gates,
        verdict=_verdict(stages, gates, is_scored=bool(metrics)),
        seconds=facts.seconds,
        versions=facts.versions,
        noise=noise,
        weights=checked.weights,
        rederived=checked.rederived,
        started=facts.started,
        command=facts.command,
        answers=tuple(each.count for each in scores.values() if each.count is not None),
        made=facts.made,
    )


def _all_faults(
    target: str,
    faults: Sequence[Finding],
    sides: Sequence[tuple[Panel, PanelScores, PanelScores]],
    scores: Mapping[Role, RoleScores],
) -> tuple[Finding, ...]:
    """Those that asking again has shown and those that the scores prove; the former say more where they are the same."""
    if any(each.code in _CAUSES for each in faults):
        return tuple(faults)
    known = {each.code for each in faults}
    is_tei = Role.ARTEFACT in scores and scores[Role.ARTEFACT].side.engine.startswith(ServerKind.TEI.value)
    return (*faults, *(each for each in score_faults(target, sides, asked_log_odds=is_tei) if each.code not in known))


_CAUSES = ("served-one-token", "served-relative", "served-unsteady", "served-warm-prefix", "served-exchanged")
"""Faults that leave scores of which nothing else can be said."""


def _side(name: str, revision: str | None, scores: RoleScores | None, nbytes: int | None) -> Side:
    side = scores.side if scores else Side(name=name, engine="", numbers="", sha256=None, prompt_sha256="")
    return replace(side, revision=revision, nbytes=nbytes)


def _undecided(gate: GateResult) -> GateResult:
    """A gate on a panel that proves nothing about the model: it can fail, but not pass."""
    if gate.outcome is not Outcome.PASS:
        return gate
    reason = f"{gate.reason}, but {gate.panel} is made for the demo models"
    return replace(gate, outcome=Outcome.INCONCLUSIVE, reason=reason)


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
    faults: Sequence[Finding],
) -> tuple[Stage, ...]:
    distances = [gate for gate in gates if gate.metric not in RANKING]
    rankings = [gate for gate in gates if gate.metric in RANKING]
    drifts = _drift_summary("log_odds", metrics)
    if case.task is Task.EMBED:
        drifts = f"{_summary('cosine_p1', metrics)} {_drift_summary('vector', metrics)}"
    return (
        replace(_noise_stage(case.options.dtype, noise), seconds=_seconds(scores, Role.REFERENCE_BF16)),
        _with_faults(
            Stage(
                name=SCORES,
                outcome=worst(gate.outcome for gate in distances),
                summary=drifts,
                seconds=_seconds(scores, Role.REFERENCE, Role.ARTEFACT),
            ),
            faults,
        ),
        Stage(RANKS, worst(gate.outcome for gate in rankings), _summary("kendall_tau", metrics)),
    )


def _seconds(scores: Mapping[Role, RoleScores], *roles: Role) -> float:
    """How long it took to score `roles`; ranking only sorts those scores."""
    return round(sum(scores[role].seconds for role in roles if role in scores), 3)


def _with_faults(stage: Stage, faults: Sequence[Finding]) -> Stage:
    """The scores stage with what the runtime was found to do; one broken finding fails it."""
    broken = [each for each in faults if each.severity is Severity.BROKEN]
    if broken:
        stage = replace(stage, outcome=Outcome.FAIL, summary=counted(broken))
    return replace(stage, findings=tuple(dict.fromkeys(faults)))


def _unscored_stages(checked: Checked, faults: Sequence[Finding]) -> tuple[Stage, ...]:
    if faults:
        stage = _with_faults(Stage(SCORES, Outcome.INCONCLUSIVE, ""), faults)
        why = f"Not run: the stage {SCORES} failed."
        return skipped(NOISE, why), stage, skipped(RANKS, why)
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


def _drift_summary(what: str, metrics: Mapping[str, MetricValue]) -> str:
    """The distance with and without the shift that all scores share, and that shift."""
    names = [f"{what}_{name}" for name in ("rmse", "rmse_centred", "bias")]
    known = {
        panel: [found.values[name] for name in names] for panel, found in metrics.items() if names[0] in found.values
    }
    shown = ", ".join(
        f"{panel} {raw:.4g} (centred {centred:.4g}, bias {bias:+.4g})" for panel, (raw, centred, bias) in known.items()
    )
    return f"{names[0]}: {shown or 'no panel gives it'}."


def _summary(metric: str, metrics: Mapping[str, MetricValue]) -> str:
    values = ((panel, found.values.get(metric)) for panel, found in metrics.items())
    shown = ", ".join(f"{panel} {value:.4g}" for panel, value in values if value is not None)
    return f"{metric}: {shown or 'no panel gives it'}."
