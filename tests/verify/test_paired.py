"""Several artefacts side by side: paired differences, joined shards, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from qtool.errors import UsageError
from qtool.verify import metrics
from qtool.verify.paired import ComparedMetric, Comparison, compare_reports
from qtool.verify.report import Report, parse_report
from tests.verify.pairs import DOCUMENTS, embedder, noisy, panel, reranker


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the time; what is certain here is certain with fewer resamples, too."""
    monkeypatch.setattr(metrics, "_RESAMPLES", 999)


def compared(*reports: Report, **options: object) -> Comparison:
    return compare_reports([(f"report-{number}", each) for number, each in enumerate(reports, start=1)], **options)


def row(comparison: Comparison, metric: str) -> ComparedMetric:
    return next(each for each in comparison.panels[0].metrics if each.metric == metric)


def outcome(comparison: Comparison, metric: str) -> str:
    return row(comparison, metric).differences[1].outcome


def uneven(size: float):
    """Errors that differ much from query to query, and are the same but for their size."""

    def answer(truth: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(3)
        return truth + size * random.lognormal(0, 1, (len(truth), 1)) * random.normal(0, 1, truth.shape)

    return answer


def test_the_difference_is_certain_where_the_intervals_of_each_overlap() -> None:
    comparison = compared(reranker("max", uneven(0.10)), reranker("better", uneven(0.09)))
    found = row(comparison, "log_odds_rmse")
    (first, second), difference = found.intervals, found.differences[1]
    assert first.low < second.high
    assert second.low < first.high
    assert difference.outcome == "better"
    assert difference.value == pytest.approx(found.values[1] - found.values[0])
    assert difference.ratio == pytest.approx(0.9)
    assert found.differences[0] is None


def test_the_interval_is_that_of_a_plain_bootstrap_of_whole_queries() -> None:
    one, other = reranker("max", noisy(0.1)), reranker("better", noisy(0.08, seed=1))
    found = row(compared(one, other), "log_odds_rmse").differences[1].interval
    delta = [np.diff(np.array(each.panels[0].scores))[:, 0].reshape(-1, DOCUMENTS) for each in (one, other)]
    random = np.random.default_rng(1)
    drawn = (random.integers(0, len(delta[0]), len(delta[0])) for _ in range(4000))
    plain = [np.sqrt((delta[1][q] ** 2).mean()) - np.sqrt((delta[0][q] ** 2).mean()) for q in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.05, 0.95])), rel=0.1)


def test_exchanging_baseline_and_artefact_exchanges_better_and_worse() -> None:
    reports = reranker("max", noisy(0.2)), reranker("better", noisy(0.05, seed=1))
    forth, back = compared(*reports), compared(*reports, baseline="report-2")
    assert (back.baseline, outcome(forth, "log_odds_rmse")) == (1, "better")
    one, other = row(forth, "log_odds_rmse").differences[1], row(back, "log_odds_rmse").differences[0]
    assert (other.value, other.outcome) == (-one.value, "worse")
    assert other.interval.low == pytest.approx(-one.interval.high, abs=1e-3)
    assert row(forth, "kendall_tau").differences[1].outcome == "better"
    assert row(back, "kendall_tau").differences[0].outcome == "worse"


def test_an_artefact_beside_itself_is_equal_and_one_of_the_same_size_of_errors_undecided() -> None:
    comparison = compared(*(reranker(name, noisy(0.1)) for name in ("max", "again")))
    outcomes = {each.differences[1].outcome for each in comparison.panels[0].metrics if each.differences[1].outcome}
    assert outcomes == {"equal"}
    assert (
        outcome(compared(reranker("max", noisy(0.1)), reranker("b", noisy(0.1, seed=5))), "log_odds_rmse")
        == "undecided"
    )


def test_a_shift_of_all_scores_is_worse_in_bias_and_not_in_what_is_centred() -> None:
    comparison = compared(reranker("max", noisy(0.1)), reranker("shifted", noisy(0.1, shift=-0.5)))
    assert outcome(comparison, "log_odds_rmse") == outcome(comparison, "log_odds_bias") == "worse"
    assert outcome(comparison, "log_odds_rmse_centred") == outcome(comparison, "kendall_tau") == "equal"
    found = row(comparison, "log_odds_bias")
    assert found.values[1] == pytest.approx(found.values[0] - 0.5)
    assert found.differences[1].value == pytest.approx(abs(found.values[1]) - abs(found.values[0]))


def test_vectors_are_compared_raw_centred_and_by_their_bias() -> None:
    comparison = compared(embedder("max", 0.1), embedder("moved", 0.1, shift=0.2), embedder("better", 0.02))
    moved, better = ({each.metric: each.differences[n] for each in comparison.panels[0].metrics} for n in (1, 2))
    assert moved["vector_rmse"].outcome == moved["vector_bias"].outcome == "worse"
    assert moved["vector_bias"].value > 5 * abs(moved["vector_rmse_centred"].value)
    assert better["vector_rmse"].outcome == better["vector_rmse_centred"].outcome == "better"
    assert better["cosine_p1"].value > 0
    assert better["cosine_p1"].interval is None


@pytest.mark.parametrize("of", [reranker, embedder])
def test_values_are_those_of_the_reports(of) -> None:
    reports = [
        of("max", noisy(0.1) if of is reranker else 0.1),
        of("b", noisy(0.1, seed=2) if of is reranker else 0.05),
    ]
    for metric in compared(*reports).panels[0].metrics:
        assert metric.values == pytest.approx(
            tuple(each.panels[0].metrics[metric.metric] for each in reports), rel=1e-12
        )
        ends = tuple(each.panels[0].intervals.get(metric.metric) for each in reports)
        assert metric.intervals == ends


def test_shards_of_one_run_are_one_artefact_with_the_numbers_of_the_whole() -> None:
    whole = reranker("max", noisy(0.1))
    better = noisy(0.05, seed=1)
    shards = [reranker("better", better, shard=f"{index}/3") for index in (3, 1, 2)]
    joined, expected = compared(whole, *shards), compared(whole, reranker("better", better))
    assert [each.side.name for each in joined.artefacts] == ["max", "better"]
    assert [(each.metric, each.differences[1]) for each in joined.panels[0].metrics] == [
        (each.metric, each.differences[1]) for each in expected.panels[0].metrics
    ]
    with pytest.raises(UsageError, match="report-2 and report-3 hold the same shard"):
        compared(whole, shards[0], shards[0])


def test_joined_shards_have_no_mean_of_vectors_and_say_so() -> None:
    shards = [embedder("better", 0.05, shard=f"{index}/2") for index in (1, 2)]
    comparison = compared(embedder("max", 0.1), *shards)
    names = {each.metric for each in comparison.panels[0].metrics}
    assert names.isdisjoint({"vector_rmse_centred", "vector_bias"})
    assert outcome(comparison, "vector_rmse") == "better"
    assert row(comparison, "cosine_p1").values[1] is None
    assert any("merge-reports" in each for each in comparison.warnings)


def test_what_only_some_answered_is_left_out_and_named() -> None:
    comparison = compared(reranker("max", noisy(0.1)), reranker("better", noisy(0.05, seed=1), limit=25))
    assert comparison.panels[0].queries == 25
    assert comparison.warnings == ("Panel balls is compared on 25 of 40 queries: those that all reports have.",)
    more = reranker("max", noisy(0.1), of=panel(name="cubes")).panels
    both = replace(reranker("max", noisy(0.1)), panels=(*reranker("max", noisy(0.1)).panels, *more))
    comparison = compared(both, reranker("better", noisy(0.05)))
    assert [each.name for each in comparison.panels] == ["balls"]
    assert comparison.warnings == ("Panel cubes is left out: not every artefact was scored on it.",)


GOOD = reranker("good", noisy(0.1))


def changed(**changes: object) -> Report:
    return replace(GOOD, panels=(replace(GOOD.panels[0], **changes),))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            replace(GOOD, reference=replace(GOOD.reference, sha256="f" * 64)),
            "are about different references: .*ffffffffffff",
        ),
        (replace(GOOD, reference=replace(GOOD.reference, prompt_sha256="f")), "different prompts of the reference"),
        (embedder("b", 0.1), "report-1 is about the task rerank and report-2 about embed"),
        (changed(sha256="f" * 64), "Panel balls is not the same in report-1 and report-2: its sha256 differs"),
        (reranker("b", noisy(0.1), of=panel(name="cubes")), "no query in common"),
        (replace(GOOD, panels=()), "Nothing was scored in report-2: its verdict is fail"),
        (changed(documents=()), "report-2 does not say which scores belong to which query: an older qtool"),
        (changed(documents=(5,) * 40), "report-2 is damaged: panel balls"),
        (changed(labels=(1.0,)), "report-2 is damaged: panel balls"),
        (changed(documents=(0, 12, *(6,) * 38)), "report-2 is damaged: panel balls"),
        (
            changed(scores=((1e200, 0.0), *GOOD.panels[0].scores[1:])),
            "report-2 is damaged: panel balls has scores beyond 1e",
        ),
        (replace(GOOD, task="sort"), "report-2 is damaged: its task is sort"),
        (replace(GOOD, artefact=replace(GOOD.artefact, nbytes=10**400)), "report-2 is damaged: .*sizes are too large"),
        (replace(GOOD, settings={"shard": "nine"}), "report-2 is damaged: Invalid shard 'nine'"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(other: Report, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        compared(GOOD, other)
    assert error.value.hint or "damaged" in message
    with pytest.raises(UsageError, match="needs two artefacts, and these reports are of 1: good"):
        compared(GOOD)


def test_a_reference_that_answered_otherwise_is_refused_in_another_dtype_and_else_a_warning() -> None:
    scores = tuple((reference + 0.01, artefact) for reference, artefact in GOOD.panels[0].scores)
    other = changed(scores=scores)
    (warning,) = compared(GOOD, other).warnings
    assert warning.startswith("The reference's own scores differ by up to 0.01 between")
    with pytest.raises(
        UsageError, match=r"differ by up to 0\.01 between report-1 \(float32 on cpu.*\(bfloat16 on cuda"
    ):
        compared(GOOD, replace(other, reference=replace(other.reference, numbers="bfloat16 on cuda")))


def test_other_engines_and_noise_floors_are_warnings() -> None:
    other = replace(
        GOOD, artefact=replace(GOOD.artefact, engine="llama.cpp"), noise=replace(GOOD.noise, p99=0.5, pairs=9)
    )
    warnings = " ".join(compared(GOOD, other).warnings)
    assert "were scored by different engines" in warnings
    assert "decisive flips are counted by that of 120 pairs" in warnings


def test_worse_for_certain_fails_only_where_it_was_asked_for() -> None:
    reports = reranker("max", noisy(0.05)), reranker("bad", noisy(0.2, seed=1))
    assert compared(*reports).passed
    failed = compared(*reports, fail_if_worse=["log_odds_rmse"])
    assert not failed.passed
    assert failed.failures[0].startswith("bad is worse than max in log_odds_rmse on balls: by +0.")
    assert compared(*reports, baseline="report-2", fail_if_worse=["log_odds_rmse", "kendall_tau"]).passed
    for metric in ("cosine_p1", "log_odds_p99"):
        with pytest.raises(UsageError, match=f"Metric {metric} cannot decide here"):
            compared(*reports, fail_if_worse=[metric])
    with pytest.raises(UsageError, match="Unknown metric 'tau'"):
        compared(*reports, fail_if_worse=["tau"])


def test_reports_that_were_written_and_read_compare_alike() -> None:
    reports = reranker("max", noisy(0.1)), reranker("b", noisy(0.05, seed=1))
    read = [parse_report(each.to_json().encode()) for each in reports]
    assert compared(*read) == compared(*reports)
    told = json.loads(json.dumps(compared(*reports).to_dict()))
    assert told["artefacts"][0]["bits_per_weight"] == 6
    assert {"schema_version", "baseline", "panels", "warnings", "failures"} <= told.keys()
