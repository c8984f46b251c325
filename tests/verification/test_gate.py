from __future__ import annotations

import pytest

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.recipe import Bound
from qtool.verification.gate import Outcome, Verdict, evaluate, verdict

METRICS = {"log_odds_rmse": 0.2, "kendall_tau": 0.9}


def outcomes(gates: dict[str, Bound], metrics: dict[str, float] = METRICS) -> list[Outcome]:
    return [result.outcome for result in evaluate(gates, Task.RERANK, [("panel", metrics)])]


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
    panels = [("text", METRICS), ("image", {**METRICS, "kendall_tau": 0.5})]
    results = evaluate({"kendall_tau": Bound(min=0.8), "log_odds_rmse": Bound(max=1)}, Task.RERANK, panels)
    assert [(result.metric, result.panel, result.outcome.value) for result in results] == [
        ("kendall_tau", "text", "pass"),
        ("kendall_tau", "image", "fail"),
        ("log_odds_rmse", "text", "pass"),
        ("log_odds_rmse", "image", "pass"),
    ]
    assert results[1].reason == "0.5 is below 0.8"
    assert verdict(results) is Verdict.FAIL


def test_a_gate_of_another_task_or_without_its_number_is_skipped_with_a_reason() -> None:
    gates = {"cosine_p1": Bound(min=0.9), "ndcg10_drop": Bound(max=0.1), "top1_agreement": Bound(min=0.1)}
    results = evaluate(gates, Task.RERANK, [("panel", METRICS)])
    assert {result.outcome for result in results} == {Outcome.SKIPPED}
    assert [result.reason for result in results] == [
        "no metric of the task rerank",
        "the panel has no relevant document",
        "the panel has no query that ranks two documents",
    ]
    assert verdict(results) is Verdict.UNGATED


def test_no_gate_no_verdict() -> None:
    assert verdict([]) is Verdict.UNGATED


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'log_odd_rmse' names no metric") as caught:
        outcomes({"log_odd_rmse": Bound(max=1)})
    assert "log_odds_rmse" in caught.value.hint
