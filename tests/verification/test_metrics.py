from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.arch.spec import Task
from qtool.verification.metrics import METRICS, QueryScores, embed_metrics, rerank_metrics

SCORE = st.integers(-3000, 3000).map(lambda value: value / 100)
QUERIES = st.lists(
    st.lists(st.tuples(SCORE, SCORE, st.integers(0, 3)), min_size=2, max_size=6).map(
        lambda rows: QueryScores(*np.array(rows, dtype=np.float64).T)
    ),
    min_size=1,
    max_size=5,
)


def query(reference: list[float], artefact: list[float], labels: list[float] | None = None) -> QueryScores:
    return QueryScores(np.array(reference), np.array(artefact), None if labels is None else np.array(labels))


def test_a_reranker_by_hand() -> None:
    metrics = rerank_metrics([query([0, 1, 2], [0, 1, 6], [0, 0, 1]), query([5, 3], [2, 3], [1, 0])])
    # Deltas 0, 0, 4, -3, 0.
    assert metrics["log_odds_rmse"] == pytest.approx(np.sqrt(5))
    assert metrics["log_odds_bias"] == pytest.approx(0.2)
    assert metrics["log_odds_p50"] == 0
    assert metrics["log_odds_max"] == 4
    assert metrics["log_odds_p95"] == pytest.approx(3.8)
    assert metrics["log_odds_p99"] == pytest.approx(3.96)
    assert metrics["kendall_tau"] == 0
    assert metrics["top1_agreement"] == 0.5
    assert metrics["ndcg10_reference"] == 1
    assert metrics["ndcg10_artefact"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert metrics["ndcg10_drop"] == pytest.approx((1 - 1 / np.log2(3)) / 2)


def test_an_embedder_by_hand() -> None:
    metrics = embed_metrics([query([0.5, 0.1], [0.4, 0.2])], np.array([1.0, 0.98, 0.5]))
    assert metrics["cosine_min"] == 0.5
    assert metrics["cosine_p50"] == 0.98
    assert metrics["cosine_p1"] == pytest.approx(0.5 + 0.02 * 0.48)
    assert metrics["similarity_rmse"] == pytest.approx(0.1)
    assert metrics["kendall_tau"] == 1


@pytest.mark.parametrize("task", list(Task))
def test_the_declared_metrics_are_the_computed_ones_in_order(task: Task) -> None:
    queries = [query([0, 1], [1, 0], [1, 0])]
    found = rerank_metrics(queries) if task is Task.RERANK else embed_metrics(queries, np.ones(3))
    assert set(found) == set(METRICS[task])


def test_what_a_panel_cannot_give_is_absent() -> None:
    single = rerank_metrics([query([1], [2])])
    assert {"kendall_tau", "top1_agreement", "ndcg10_drop"}.isdisjoint(single)
    assert single["log_odds_bias"] == 1
    assert "ndcg10_drop" not in rerank_metrics([query([1, 2], [2, 3], [0, 0])])


@given(QUERIES)
def test_a_model_against_itself_is_perfect(queries: list[QueryScores]) -> None:
    metrics = rerank_metrics([QueryScores(one.reference, one.reference, one.labels) for one in queries])
    assert metrics["log_odds_max"] == metrics["log_odds_rmse"] == metrics["log_odds_bias"] == 0
    assert metrics.get("kendall_tau", 1) == pytest.approx(1)
    assert metrics.get("top1_agreement", 1) == 1
    assert metrics.get("ndcg10_drop", 0) == 0


@given(QUERIES)
def test_distances_are_ordered_and_symmetric(queries: list[QueryScores]) -> None:
    metrics = rerank_metrics(queries)
    swapped = rerank_metrics([QueryScores(one.artefact, one.reference, one.labels) for one in queries])
    names = ["log_odds_p50", "log_odds_p95", "log_odds_p99", "log_odds_max"]
    values = [metrics[name] for name in names]
    assert values == sorted(values)
    assert abs(metrics["log_odds_bias"]) <= metrics["log_odds_rmse"] * (1 + 1e-9)
    assert metrics["log_odds_rmse"] <= metrics["log_odds_max"] * (1 + 1e-9)
    assert [swapped[name] for name in names] == values
    assert swapped["log_odds_bias"] == -metrics["log_odds_bias"]


@given(QUERIES, st.randoms(use_true_random=False))
def test_the_order_of_queries_does_not_matter(queries: list[QueryScores], random: object) -> None:
    shuffled = list(queries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert rerank_metrics(shuffled) == pytest.approx(rerank_metrics(queries), abs=1e-12)
