"""Gates: the bounds of a recipe, held against the metrics of each panel.

Where a metric has an interval, all of it must lie within the bound to pass and all of it outside to fail. Anything else is
inconclusive, and so is a ranking that would pass on too few queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome
from qtool.errors import UsageError
from qtool.recipe import Bound
from qtool.verify.metrics import METRICS, RANKING, Interval, MetricValue

LEAST_QUERIES: Final = 100
"""A ranking on fewer queries never passes: the bootstrap of few queries gives too narrow an interval."""


class Verdict(str, Enum):
    """The outcome of all stages together; UNGATED where no gate applied."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    UNGATED = "ungated"


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate on one panel; `reason` is a phrase for people."""

    metric: str
    panel: str
    value: float | None
    interval: Interval | None
    min: float | None
    max: float | None
    outcome: Outcome
    reason: str


def evaluate(
    gates: Mapping[str, Bound], task: Task, panels: Sequence[tuple[str, MetricValue]]
) -> tuple[GateResult, ...]:
    """Every gate on every panel: gates in the recipe's order, under each the panels in theirs."""
    check_names(gates)
    return tuple(_judge(metric, gates[metric], task, panel, measured) for metric in gates for panel, measured in panels)


def check_names(gates: Iterable[str]) -> None:
    """Raise UsageError on a gate that names no metric of any task."""
    known = list(dict.fromkeys(name for names in METRICS.values() for name in names))
    unknown = [metric for metric in gates if metric not in known]
    if unknown:
        raise UsageError(f"Unknown metric {unknown[0]!r} in the recipe's gates.", f"Known are {', '.join(known)}.")


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of several outcomes; SKIPPED if all were."""
    found = set(outcomes)
    return next((each for each in (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS) if each in found), Outcome.SKIPPED)


def _judge(metric: str, bound: Bound, task: Task, panel: str, measured: MetricValue) -> GateResult:
    value, interval = measured.values.get(metric), measured.intervals.get(metric)
    if metric not in METRICS[task]:
        outcome, reason = Outcome.SKIPPED, f"not a metric of the task {task.value}"
    elif value is None:
        outcome, reason = Outcome.SKIPPED, _why_absent(metric)
    elif interval is None and metric in measured.queries:
        outcome, reason = Outcome.INCONCLUSIVE, f"{value:.4g}, from a single query"
    else:
        outcome, reason = _held(bound, value, interval or Interval(value, value))
        queries = measured.queries.get(metric, LEAST_QUERIES)
        if outcome is Outcome.PASS and metric in RANKING and queries < LEAST_QUERIES:
            outcome = Outcome.INCONCLUSIVE
            reason = f"within bounds, but on {queries} queries; a pass needs {LEAST_QUERIES}"
    return GateResult(
        metric=metric,
        panel=panel,
        value=value,
        interval=interval,
        min=bound.min,
        max=bound.max,
        outcome=outcome,
        reason=reason,
    )


def _held(bound: Bound, value: float, interval: Interval) -> tuple[Outcome, str]:
    least = -float("inf") if bound.min is None else bound.min
    most = float("inf") if bound.max is None else bound.max
    if least <= interval.low and interval.high <= most:
        return Outcome.PASS, f"{value:.4g} is within bounds"
    if interval.high < least:
        return Outcome.FAIL, f"{_shown(value, interval, 'high')} is below {least:g}"
    if interval.low > most:
        return Outcome.FAIL, f"{_shown(value, interval, 'low')} is above {most:g}"
    if not interval.low <= interval.high:  # not a number
        return Outcome.FAIL, f"{value} is not a number"
    ends = f"{interval.low:.4g} to {interval.high:.4g}"
    return Outcome.INCONCLUSIVE, f"{value:.4g}, but its interval {ends} crosses the bound"


def _shown(value: float, interval: Interval, end: str) -> str:
    if interval.low == interval.high:
        return f"{value:.4g}"
    return f"{value:.4g} (at {'most' if end == 'high' else 'least'} {getattr(interval, end):.4g})"


def _why_absent(metric: str) -> str:
    if metric.startswith(("ndcg", "mrr", "recovery")):
        return "the panel has no relevant document"
    if metric == "decisive_flips":
        return "no noise floor was measured, or no two documents are further apart than it"
    if "_mrl" in metric:
        return "the vectors have no more dimensions than that"
    return "no query of the panel has enough documents"
