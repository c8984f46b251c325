from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.arch.spec import Task
from qtool.verify.metrics import (
    METRICS,
    MRL_DIMENSIONS,
    QueryScores,
    distances,
    measure,
    vector_errors,
    vector_metrics,
)

SCORE = st.integers(-3000, 3000).map(lambda value: value / 100)
QUERIES = st.lists(
    st.lists(st.tuples(SCORE, SCORE, st.integers(0, 3)), min_size=2, max_size=6).map(
        lambda rows: QueryScores(*np.array(rows, dtype=np.float64).T)
    ),
    min_size=1,
    max_size=5,
)


def rerank_metrics(queries: list[QueryScores]) -> dict[str, float]:
    return dict(measure("log_odds", queries).values)


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


def test_vectors_by_hand() -> None:
    turned = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    metrics = vector_metrics(np.array([[1.0, 0], [0, 1], [1, 0]]), turned)
    assert metrics["cosine_min"] == 0.6
    assert metrics["cosine_p50"] == 1
    assert metrics["cosine_p1"] == pytest.approx(0.6 + 0.02 * 0.4)
    # Similarities 0, 1, 0 against 0, 0.6, 0.8.
    assert metrics["similarity_spearman"] == pytest.approx(0)


def test_a_shift_of_all_scores_is_bias_and_what_changes_an_order_is_centred() -> None:
    scores = np.random.default_rng(0).normal(0, 3, (40, 8))
    shifted = measure("log_odds", [query(row, row + 0.5) for row in scores])
    assert shifted.values["log_odds_rmse"] == shifted.values["log_odds_bias"] == pytest.approx(0.5)
    assert shifted.values["log_odds_rmse_centred"] == pytest.approx(0, abs=1e-7)
    assert shifted.values["kendall_tau"] == pytest.approx(1)
    noise = np.random.default_rng(1).normal(0, 0.2, scores.shape)
    both = measure("log_odds", [query(row, row + 0.5 + each) for row, each in zip(scores, noise, strict=True)])
    raw, centred, bias = (both.values[f"log_odds_{name}"] for name in ("rmse", "rmse_centred", "bias"))
    assert raw**2 == pytest.approx(centred**2 + bias**2)
    assert centred == pytest.approx(noise.std())
    assert both.intervals["log_odds_rmse_centred"].high < both.intervals["log_odds_rmse"].low


def test_vectors_that_all_move_alike_are_bias_by_hand() -> None:
    reference = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    artefact = reference + np.array([[0.3, 0.4], [0.3, 0.4], [0.3, 0.4], [0.3, 0.0]])
    errors = vector_errors(reference, artefact, np.array([0, 0, 1, 1]), 3)
    assert errors == pytest.approx(np.array([[0.5, 0.02, 2], [0.34, 0.1, 2], [0, 0, 0]]))
    queries = [replace(query([0, 1], [0, 1]), vectors=tuple(row)) for row in errors]
    values = measure("similarity", queries).values
    assert values["vector_rmse"] == pytest.approx(np.sqrt(0.84 / 4))
    assert values["vector_rmse_centred"] == pytest.approx(np.sqrt(0.12 / 4))
    assert values["vector_bias"] == pytest.approx(np.hypot(0.3, 0.3))


def test_the_similarities_of_many_items_are_compared_on_a_fixed_draw_of_them() -> None:
    vectors = np.random.default_rng(0).standard_normal((5000, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    turned = vectors + 0.05 * np.random.default_rng(1).standard_normal(vectors.shape)
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    found = vector_metrics(vectors, turned)
    assert 0.95 < found["similarity_spearman"] < 1
    assert vector_metrics(vectors, turned) == found


def test_slope_tells_a_stretched_model_from_a_shifted_one() -> None:
    stretched = rerank_metrics([query([0, 1, 2], [0, 1.5, 3]), query([4, 3], [6, 4.5])])
    assert stretched["log_odds_slope"] == pytest.approx(1.5)
    assert rerank_metrics([query([0, 1, 2], [1, 2, 3])])["log_odds_slope"] == pytest.approx(1)
    assert "log_odds_slope" not in rerank_metrics([query([0.1, 0.1], [1, 2])])


def test_only_flips_beyond_the_margin_are_decisive() -> None:
    queries = [query([0, 0.1, 2], [0.1, 0, 2]), query([0, 2], [2, 0])]
    assert measure("log_odds", queries, margin=0.5).values["decisive_flips"] == pytest.approx(1 / 3)
    assert measure("log_odds", queries, margin=0.05).values["decisive_flips"] == pytest.approx(2 / 4)
    assert "decisive_flips" not in measure("log_odds", queries, margin=5).values
    assert "decisive_flips" not in measure("log_odds", queries).values


def test_recovery_and_reciprocal_ranks_by_hand() -> None:
    metrics = rerank_metrics([query([3, 2, 1], [1, 2, 3], [1, 0, 0])])
    assert metrics["mrr_reference"] == 1
    assert metrics["mrr_artefact"] == pytest.approx(1 / 3)
    assert metrics["mrr_drop"] == pytest.approx(2 / 3)
    assert metrics["recovery"] == pytest.approx(50)


def test_every_computed_metric_is_declared_and_every_declared_one_computed() -> None:
    many = [query([0, 1, 2, 3, 4, 5.5], [1, 0, 2, 3, 4, 5], [1, 0, 0, 0, 0, 2])]
    reranker = measure("log_odds", many, margin=0.5)
    assert set(reranker.values) == set(METRICS[Task.RERANK])
    one, other = np.array([[1.0, 0], [0, 1], [1, 0]]), np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    vectors = vector_metrics(one, other)
    mrl = {f"{name}_mrl{dimensions}" for name in vectors for dimensions in MRL_DIMENSIONS}
    embedder = measure("similarity", [replace(many[0], vectors=(2.0, 1.0, 3.0))], margin=0.5)
    assert set(vectors) | mrl | set(embedder.values) == set(METRICS[Task.EMBED])


def test_intervals_hold_their_value_and_narrow_with_queries() -> None:
    random = np.random.default_rng(0)

    def width(count: int) -> float:
        queries = [query(scores, scores + random.normal(0, 0.1, 8)) for scores in random.normal(0, 3, (count, 8))]
        measured = measure("log_odds", queries)
        for name, interval in measured.intervals.items():
            assert interval.low <= measured.values[name] <= interval.high
        assert measured.queries["log_odds_rmse"] == count
        rmse = measured.intervals["log_odds_rmse"]
        return rmse.high - rmse.low

    assert width(400) < 0.6 * width(50)


def test_distances_are_those_of_measure() -> None:
    queries = [query([0, 1, 2], [0, 1, 6]), query([5, 3], [2, 3])]
    whole = measure("log_odds", queries).values
    assert all(whole[name] == value for name, value in distances("log_odds", queries).items())


def test_what_a_panel_cannot_give_is_absent() -> None:
    single = rerank_metrics([query([1], [2])])
    assert {"kendall_tau", "weighted_tau", "top1_agreement", "ndcg10_drop", "mrr_drop"}.isdisjoint(single)
    assert single["log_odds_bias"] == 1
    assert "ndcg10_drop" not in rerank_metrics([query([1, 2], [2, 3], [0, 0])])


@settings(max_examples=25)
@given(QUERIES)
def test_a_model_against_itself_is_perfect(queries: list[QueryScores]) -> None:
    metrics = rerank_metrics([QueryScores(one.reference, one.reference, one.labels) for one in queries])
    assert metrics["log_odds_max"] == metrics["log_odds_rmse"] == metrics["log_odds_bias"] == 0
    assert metrics.get("kendall_tau", 1) == pytest.approx(1)
    assert metrics.get("top1_agreement", 1) == 1
    assert metrics.get("ndcg10_drop", 0) == 0


@settings(max_examples=25)
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


@settings(max_examples=25)
@given(QUERIES, st.randoms(use_true_random=False))
def test_the_order_of_queries_does_not_matter(queries: list[QueryScores], random: object) -> None:
    shuffled = list(queries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert rerank_metrics(shuffled) == pytest.approx(rerank_metrics(queries), abs=1e-12)
