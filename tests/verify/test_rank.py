from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from qtool.verify.metrics import flips, kendall_tau, ndcg, reciprocal_rank, top_agreement, weighted_tau

COARSE = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.array(rows, dtype=np.float64).T
    return first, second


@given(COARSE)
def test_kendall_tau_is_scipys_where_scipys_is_defined(rows: list[tuple[int, int]]) -> None:
    reference, artefact = columns(rows)
    ours = kendall_tau(reference, artefact)
    if np.ptp(reference) == 0:
        assert ours is None
    elif np.ptp(artefact) == 0:
        assert ours == 0
    else:
        assert ours == pytest.approx(kendalltau(reference, artefact).statistic)


@given(COARSE)
def test_rank_metrics_see_order_only(rows: list[tuple[int, int]]) -> None:
    reference, artefact = columns(rows)
    stretched = 3 * artefact**3 + artefact - 7
    assert kendall_tau(reference, stretched) == kendall_tau(reference, artefact)
    assert top_agreement(reference, stretched, 1) == top_agreement(reference, artefact, 1)
    assert ndcg(np.abs(reference), stretched) == ndcg(np.abs(reference), artefact)


@given(COARSE, st.randoms(use_true_random=False))
def test_the_panels_order_does_not_matter(rows: list[tuple[int, int]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    before, after = columns(rows), columns(shuffled)
    assert kendall_tau(*after) == pytest.approx(kendall_tau(*before))
    assert top_agreement(*after, 1) == pytest.approx(top_agreement(*before, 1))
    assert ndcg(np.abs(after[0]), after[1]) == pytest.approx(ndcg(np.abs(before[0]), before[1]))


def test_top1_agreement_by_hand() -> None:
    def agreement(reference: list[float], artefact: list[float], top: int = 1) -> float | None:
        return top_agreement(np.array(reference), np.array(artefact), top)

    assert agreement([3, 2, 1], [9, 8, 7]) == 1
    assert agreement([3, 2, 1], [7, 8, 9]) == 0
    assert agreement([3, 3, 1], [1, 2, 0]) == 1  # either of the reference's best will do
    assert agreement([3, 2, 1, 0], [5, 5, 5, 5]) == 0.25  # a constant model agrees by chance
    assert agreement([3], [1]) is None
    assert agreement([4, 3, 2, 1], [1, 4, 3, 2], top=2) == 0.5
    assert agreement([4, 3, 2, 1], [4, 2, 2, 2], top=2) == pytest.approx((1 + 1 / 3) / 2)


def test_flips_count_orders_that_the_reference_was_sure_of() -> None:
    reference = np.array([0.0, 1, 3])
    assert flips(reference, np.array([0.0, 1, 3]), 0.5) == (0, 3)
    assert flips(reference, np.array([1.0, 0, 3]), 0.5) == (1, 3)
    assert flips(reference, np.array([1.0, 0, 3]), 1) == (0, 2)
    assert flips(reference, np.array([5.0, 5, 5]), 0.5) == (3, 3)  # a tie is no order


def test_weighted_tau_minds_the_top_most() -> None:
    reference = np.array([4.0, 3, 2, 1])
    top, end = (weighted_tau(reference, np.array(other)) for other in ([3.0, 4, 2, 1], [4.0, 3, 1, 2]))
    assert top < end < 1
    assert weighted_tau(reference, reference) == pytest.approx(1)
    assert weighted_tau(np.ones(3), reference[:3]) is None
    assert weighted_tau(reference, np.ones(4)) == 0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6))
def test_reciprocal_rank_of_ties_is_the_mean_over_their_orders(rows: list[tuple[int, int]]) -> None:
    labels, scores = columns(rows)

    def first(order: tuple[int, ...]) -> float:
        ranked = labels[np.argsort(-(scores + 1e-3 * np.array(order)))]
        return float(1 / (1 + np.argmax(ranked > 0)))

    ours = reciprocal_rank(labels, scores)
    if labels.any():
        assert ours == pytest.approx(np.mean([first(order) for order in permutations(range(len(rows)))]))
    else:
        assert ours is None


def test_reciprocal_rank_of_a_model_that_answers_a_thousand_documents_alike() -> None:
    labels = np.array([0.0, 1.0] * 600)
    # Of two drawn without end one is relevant: 1/2 + 1/4·1/2 + 1/8·1/3 + … = ln 2.
    assert reciprocal_rank(labels, np.zeros(1200)) == pytest.approx(np.log(2), abs=1e-3)


def test_ndcg_by_hand() -> None:
    # Ranked 0, 2, 1: gains 0, 3, 1 at discounts 1, 1/log2(3), 1/2; ideal 3, 1, 0.
    expected = (3 / math.log2(3) + 1 / 2) / (3 + 1 / math.log2(3))
    assert ndcg(np.array([0.0, 2, 1]), np.array([0.9, 0.5, 0.1])) == pytest.approx(expected)
    assert ndcg(np.array([2.0, 1, 0]), np.array([0.9, 0.5, 0.1])) == pytest.approx(1)
    assert ndcg(np.array([0.0, 0]), np.array([1.0, 2])) is None


def test_ndcg_cuts_at_ten() -> None:
    labels = np.zeros(12)
    labels[11] = 1
    assert ndcg(labels, -np.arange(12.0)) == 0
    labels[9] = 1
    assert ndcg(labels, -np.arange(12.0)) == pytest.approx((1 / math.log2(11)) / (1 + 1 / math.log2(3)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=2, max_size=6))
def test_ndcg_of_ties_is_the_mean_over_their_orders(rows: list[tuple[int, int]]) -> None:
    labels, scores = columns(rows)
    orders = [ndcg(labels, scores + 1e-3 * np.array(order)) for order in permutations(range(len(rows)))]
    if labels.any():
        assert ndcg(labels, scores, cutoff=10) == pytest.approx(np.mean(orders))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 50)), min_size=1, max_size=14, unique_by=lambda row: row[1])
)
def test_ndcg_equals_the_textbook_loop(rows: list[tuple[int, int]]) -> None:
    ranked = [label for label, _ in sorted(rows, key=lambda row: -row[1])]

    def dcg(labels: list[int]) -> float:
        return sum((2**label - 1) / math.log2(place + 2) for place, label in enumerate(labels[:10]))

    ideal = dcg(sorted(ranked, reverse=True))
    ours = ndcg(*columns(rows))
    assert ours == (pytest.approx(dcg(ranked) / ideal) if ideal else None)
