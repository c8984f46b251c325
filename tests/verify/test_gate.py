from __future__ import annotations

import pytest

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome
from qtool.errors import UsageError
from qtool.recipe import Bound
from qtool.verify.gates import evaluate, worst
from qtool.verify.metrics import Interval, MetricValue

METRICS = {"log_odds_rmse": 0.2, "kendall_tau": 0.9}


def outcomes(gates: dict[str, Bound], metrics: dict[str, float] = METRICS) -> list[Outcome]:
    return [result.outcome for result in evaluate(gates, Task.RERANK, [("panel", MetricValue(metrics))])]


def outcome_of(low: float, high: float, bound: Bound, metric: str = "log_odds_rmse", queries: int = 100) -> Outcome:
    measured = MetricValue({metric: (low + high) / 2}, {metric: Interval(low, high)}, {metric: queries})
    return evaluate({metric: bound}, Task.RERANK, [("panel", measured)])[0].outcome


@pytest.mark.parametrize(
    ("low", "high", "bound", "outcome"),
    [
        (0.1, 0.2, Bound(max=0.2), Outcome.PASS),
        (0.1, 0.3, Bound(max=0.2), Outcome.INCONCLUSIVE),
        (0.25, 0.3, Bound(max=0.2), Outcome.FAIL),
        (0.9, 0.95, Bound(min=0.9), Outcome.PASS),
        (0.8, 0.95, Bound(min=0.9), Outcome.INCONCLUSIVE),
        (0.7, 0.8, Bound(min=0.9), Outcome.FAIL),
        (-0.1, 0.3, Bound(min=-0.2, max=0.2), Outcome.INCONCLUSIVE),
    ],
)
def test_the_whole_interval_must_lie_within_or_outside(low: float, high: float, bound: Bound, outcome: Outcome) -> None:
    assert outcome_of(low, high, bound) == outcome


def test_a_ranking_never_passes_on_few_queries_but_may_fail() -> None:
    assert outcome_of(0.95, 0.99, Bound(min=0.9), "kendall_tau", 99) is Outcome.INCONCLUSIVE
    assert outcome_of(0.95, 0.99, Bound(min=0.9), "kendall_tau", 100) is Outcome.PASS
    assert outcome_of(0.5, 0.6, Bound(min=0.9), "kendall_tau", 10) is Outcome.FAIL
    assert outcome_of(0.1, 0.1, Bound(max=0.2), "log_odds_rmse", 10) is Outcome.PASS


def test_the_worst_outcome_counts() -> None:
    assert worst([Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.SKIPPED]) is Outcome.INCONCLUSIVE
    assert worst([Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.FAIL]) is Outcome.FAIL
    assert worst([Outcome.PASS, Outcome.SKIPPED]) is Outcome.PASS
    assert worst([Outcome.SKIPPED]) is worst([]) is Outcome.SKIPPED


@pytest.mark.parametrize(
    ("bound", "outcome"),
    [
        (Bound(max=0.2), Outcome.PASS),
        (Bound(max=0.19), Outcome.FAIL),
        (Bound(min=0.2), Outcome.PASS),
        (Bound(min=0.21), Outcome.FAIL),
        (Bound(min=0.1, max=0.3), Outcome.PASS),
    ],
)
def test_a_bound_includes_its_ends(bound: Bound, outcome: Outcome) -> None:
    assert outcomes({"log_odds_rmse": bound}) == [outcome]


def test_nan_never_passes() -> None:
    nan = {"log_odds_rmse": float("nan")}
    assert (
        outcomes({"log_odds_rmse": Bound(max=1)}, nan)
        == outcomes({"log_odds_rmse": Bound(min=0)}, nan)
        == [Outcome.FAIL]
    )


def test_gates_go_by_recipe_then_by_panel() -> None:
    panels = [("text", MetricValue(METRICS)), ("image", MetricValue({**METRICS, "kendall_tau": 0.5}))]
    results = evaluate({"kendall_tau": Bound(min=0.8), "log_odds_rmse": Bound(max=1)}, Task.RERANK, panels)
    assert [(result.metric, result.panel, result.outcome.value) for result in results] == [
        ("kendall_tau", "text", "pass"),
        ("kendall_tau", "image", "fail"),
        ("log_odds_rmse", "text", "pass"),
        ("log_odds_rmse", "image", "pass"),
    ]
    assert results[1].reason == "0.5 is below 0.8"


def test_a_gate_of_another_task_or_without_its_number_is_skipped_with_a_reason() -> None:
    gates = {"cosine_p1": Bound(min=0.9), "ndcg10_drop": Bound(max=0.1), "top1_agreement": Bound(min=0.1)}
    results = evaluate(gates, Task.RERANK, [("panel", MetricValue(METRICS))])
    assert {result.outcome for result in results} == {Outcome.SKIPPED}
    assert [result.reason for result in results] == [
        "not a metric of the task rerank",
        "the panel has no relevant document",
        "no query of the panel has enough documents",
    ]


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Unknown metric 'log_odd_rmse'") as caught:
        outcomes({"log_odd_rmse": Bound(max=1)})
    assert "log_odds_rmse" in caught.value.hint
