"""Gates: the bounds of a recipe, held against the metrics of each panel.

Rule: a gate never passes in silence. It passes on a number inside its bound, fails on one outside, is skipped with a
reason where the task or panel has no such number, and is an error where nobody knows its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.verification.metrics import METRICS


class Range(Protocol):
    """A recipe's bound; either end may be open."""

    @property
    def min(self) -> float | None:
        """The least value that passes."""

    @property
    def max(self) -> float | None:
        """The greatest value that passes."""


class Outcome(str, Enum):
    """What became of one gate on one panel."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"


class Verdict(str, Enum):
    """What the gates say together; UNGATED where none could be held against a number."""

    PASS = "pass"
    FAIL = "fail"
    UNGATED = "ungated"


@dataclass(frozen=True)
class GateResult:
    """One gate on one panel; `reason` is a phrase for people."""

    metric: str
    panel: str
    value: float | None
    min: float | None
    max: float | None
    outcome: Outcome
    reason: str


def evaluate(
    gates: Mapping[str, Range], task: Task, panels: Sequence[tuple[str, Mapping[str, float]]]
) -> tuple[GateResult, ...]:
    """Every gate on every panel: gates in the recipe's order, under each the panels in theirs."""
    check_names(gates)
    return tuple(_judge(metric, gates[metric], task, panel, values) for metric in gates for panel, values in panels)


def check_names(gates: Iterable[str]) -> None:
    """Raise UsageError on a gate that names no metric of any task."""
    known = list(dict.fromkeys(name for names in METRICS.values() for name in names))
    unknown = [metric for metric in gates if metric not in known]
    if unknown:
        raise UsageError(f"The recipe's gate {unknown[0]!r} names no metric.", f"Known are {', '.join(known)}.")


def verdict(results: Iterable[GateResult]) -> Verdict:
    """FAIL if any gate failed, else PASS if any passed."""
    outcomes = {result.outcome for result in results}
    if Outcome.FAIL in outcomes:
        return Verdict.FAIL
    return Verdict.PASS if Outcome.PASS in outcomes else Verdict.UNGATED


def _judge(metric: str, bound: Range, task: Task, panel: str, values: Mapping[str, float]) -> GateResult:
    value = values.get(metric)
    outcome, reason = _outcome(metric, bound, task, value)
    return GateResult(metric, panel, value, bound.min, bound.max, outcome, reason)


def _outcome(metric: str, bound: Range, task: Task, value: float | None) -> tuple[Outcome, str]:
    if metric not in METRICS[task]:
        return Outcome.SKIPPED, f"no metric of the task {task.value}"
    if value is None:
        return Outcome.SKIPPED, _why_absent(metric)
    # Written so that NaN fails.
    if bound.min is not None and not value >= bound.min:
        return Outcome.FAIL, f"{value:.4g} is below {bound.min:g}"
    if bound.max is not None and not value <= bound.max:
        return Outcome.FAIL, f"{value:.4g} is above {bound.max:g}"
    return Outcome.PASS, f"{value:.4g} is within bounds"


def _why_absent(metric: str) -> str:
    if metric.startswith("ndcg"):
        return "the panel has no relevant document"
    return "the panel has no query that ranks two documents"
