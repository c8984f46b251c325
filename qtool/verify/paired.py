"""Several artefacts beside each other: what each has drifted, and the difference of two on the same queries.

Two metrics whose intervals overlap may still differ for certain, since both artefacts answered the same queries: what is
resampled is the difference. Queries are drawn with the same seed for every metric and artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from typing_extensions import override

from qtool.errors import UsageError
from qtool.redaction import redacted
from qtool.results import Result
from qtool.verify.gates import check_names
from qtool.verify.made import Made
from qtool.verify.metrics import METRICS, Interval, QueryScores, QueryTerms, bca_interval, quantiles, query_terms
from qtool.verify.pairing import Scored, common_queries, has_means, margin_of, scored_artefacts
from qtool.verify.report import Report, Side

SCHEMA_VERSION: Final = 1

# Which way a metric is better. Those of the reference alone, and of shortened vectors, are not compared.

_HIGHER: Final = ("kendall_tau", "weighted_tau", "top1_agreement", "top5_agreement", "ndcg10_artefact", "recovery")
_ALSO_HIGHER: Final = ("mrr_artefact", "cosine_p50", "cosine_p1", "cosine_min", "similarity_spearman")
_OF_THE_REFERENCE: Final = ("ndcg10_reference", "mrr_reference")
_CENTRED_VECTORS: Final = ("vector_rmse_centred", "vector_bias")
_ROUNDING: Final = 1e-6
"""Differences up to this are those of one model scored twice: the order of float32 sums depends on what runs beside it."""


def _is_higher_better(metric: str) -> bool:
    return metric in (*_HIGHER, *_ALSO_HIGHER)


def _size(metric: str) -> Callable[[Any], Any]:
    """What of a metric is compared: of a signed bias and of a slope how far they are from 0 and from 1."""
    if metric.endswith("_slope"):
        return lambda value: np.abs(value - 1)
    return np.abs if metric.endswith("_bias") else lambda value: value


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An artefact's metric minus the baseline's; of `bias` and `slope`, of their distances from 0 and from 1.

    `interval` holds the difference where other queries had been drawn, and is None for a metric that is no function of
    sums over queries. `ratio` is the artefact's over the baseline's, for a distance. `outcome` is "better" or "worse"
    where the whole interval is on one side of 0, "equal" where all of it is rounding, else "undecided"; empty without an
    interval.
    """

    value: float
    interval: Interval | None
    ratio: float | None
    outcome: str


@dataclass(frozen=True, kw_only=True)
class ComparedMetric:
    """A metric of all artefacts, in their order; None where one lacks it. The baseline has no difference."""

    metric: str
    values: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...]
    differences: tuple[Difference | None, ...]


@dataclass(frozen=True, kw_only=True)
class ComparedPanel:
    """A panel that all artefacts answered, and the queries of it that all did."""

    name: str
    sha256: str
    queries: int
    pairs: int
    metrics: tuple[ComparedMetric, ...]


@dataclass(frozen=True, kw_only=True)
class ComparedArtefact:
    """One of the artefacts: `source` is its report, of shards the first; `gates_recipe` is the recipe that judged it."""

    source: str
    side: Side
    made: Made | None
    bits_per_weight: float | None
    verdict: str
    gates_recipe: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Artefacts side by side on the same queries; `baseline` is the place of the one that the others are held against.

    `fail_if_worse` are the metrics in which none may be worse than the baseline for certain.
    """

    reference: Side
    task: str
    baseline: int
    artefacts: tuple[ComparedArtefact, ...]
    panels: tuple[ComparedPanel, ...]
    warnings: tuple[str, ...] = ()
    fail_if_worse: tuple[str, ...] = ()
    command: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def failures(self) -> tuple[str, ...]:
        """Each metric of `fail_if_worse` in which an artefact is worse than the baseline, in a sentence."""
        return tuple(
            f"{self.artefacts[place].side.name} is worse than {self.artefacts[self.baseline].side.name} in "
            f"{row.metric} on {panel.name}: by {difference.value:+.4g}."
            for panel in self.panels
            for row in panel.metrics
            if row.metric in self.fail_if_worse
            for place, difference in enumerate(row.differences)
            if difference is not None and difference.outcome == "worse"
        )

    @property
    def passed(self) -> bool:
        """Whether nothing of `fail_if_worse` is worse."""
        return not self.failures

    @property
    @override
    def headline(self) -> str:
        names = [each.side.name for each in self.artefacts]
        others = ", ".join(name for place, name in enumerate(names) if place != self.baseline)
        return f"{others} beside {names[self.baseline]}, on {sum(panel.queries for panel in self.panels)} queries."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "panel": panel.name,
                "metric": row.metric,
                "artefact": each.side.name,
                "value": row.values[place],
                "difference": difference.value if (difference := row.differences[place]) else None,
                "low": difference.interval.low if difference and difference.interval else None,
                "high": difference.interval.high if difference and difference.interval else None,
                "ratio": difference.ratio if difference else None,
                "outcome": difference.outcome if difference else None,
            }
            for panel in self.panels
            for row in panel.metrics
            for place, each in enumerate(self.artefacts)
        ]

    @override
    def to_dict(self) -> dict[str, Any]:
        return redacted({"schema_version": self.schema_version, **asdict(self), "failures": list(self.failures)})


def compare_reports(
    reports: Sequence[tuple[str, Report]],
    baseline: str | None = None,
    fail_if_worse: Sequence[str] = (),
    command: str = "",
) -> Comparison:
    """The artefacts of `reports`, each given with its source, side by side; shards of one run are one artefact.

    `baseline` is a source, by default the first. Raises UsageError for reports that cannot be compared: of fewer than two
    artefacts, of other references, tasks or panels, without scores, or without what pairs them.
    """
    check_names(fail_if_worse)
    artefacts, warnings = scored_artefacts(reports), list[str]()
    place = 0 if baseline is None else next(n for n, each in enumerate(artefacts) if baseline in each.sources)
    margin = margin_of(artefacts, warnings)
    panels = tuple(_panels(artefacts, place, margin, warnings))
    if len({(each.side.engine, each.side.numbers) for each in artefacts}) > 1:
        warnings.append(
            "The artefacts were scored by different engines or in other precisions, which differ by themselves."
        )
    compared = [
        row for panel in panels for row in panel.metrics if any(each and each.outcome for each in row.differences)
    ]
    decided = list(dict.fromkeys(row.metric for row in compared))
    for metric in fail_if_worse:
        if metric not in decided:
            raise UsageError(
                f"Metric {metric} cannot decide here: these reports do not have it, or it has no interval.",
                f"Choose among {', '.join(decided)}.",
            )
    return Comparison(
        reference=artefacts[place].report.reference,
        task=artefacts[place].report.task,
        baseline=place,
        artefacts=tuple(map(_artefact, artefacts)),
        panels=panels,
        warnings=tuple(dict.fromkeys(warnings)),
        fail_if_worse=tuple(dict.fromkeys(fail_if_worse)),
        command=command,
    )


def _artefact(each: Scored) -> ComparedArtefact:
    report = each.report
    weights, nbytes = report.reference.parameters, report.artefact.nbytes
    return ComparedArtefact(
        source=each.sources[0],
        side=report.artefact,
        made=report.made,
        bits_per_weight=8 * nbytes / weights if weights and nbytes is not None else None,
        verdict=report.verdict.value,
        gates_recipe=report.recipe,
    )


def _panels(
    artefacts: Sequence[Scored], baseline: int, margin: float | None, warnings: list[str]
) -> Iterator[ComparedPanel]:
    what = "log_odds" if artefacts[0].report.task == "rerank" else "similarity"
    for sha256, places in common_queries(artefacts, warnings).items():
        first = artefacts[0].panels[sha256].report
        queries = [[each.panels[sha256].queries[place] for place in places] for each in artefacts]
        measured = [query_terms(what, own, margin) for own in queries]
        if not has_means(artefacts, sha256, places):
            measured = [{name: each for name, each in own.items() if name not in _CENTRED_VECTORS} for own in measured]
        points = [_points(what, each, sha256, own) for each, own in zip(artefacts, queries, strict=True)]
        known = [_intervals(each, sha256, own) for each, own in zip(artefacts, queries, strict=True)]
        names = [name for name in _order(artefacts[0].report.task, measured, points) if name not in _OF_THE_REFERENCE]
        yield ComparedPanel(
            name=first.name,
            sha256=sha256,
            queries=len(places),
            pairs=sum(len(query.reference) for query in queries[0]),
            metrics=tuple(_metric(name, measured, points, known, baseline) for name in names),
        )


def _points(what: str, scored: Scored, sha256: str, queries: Sequence[QueryScores]) -> Mapping[str, float]:
    """The metrics that are no functions of sums over queries; those of vectors only where the report is on these queries."""
    panel = scored.panels[sha256]
    known = panel.report.metrics if panel.is_whole and len(queries) == len(panel.queries) else {}
    vectors = {name: value for name, value in known.items() if "_mrl" not in name and _is_of_vectors(name)}
    return {**vectors, **quantiles(what, queries)}


def _intervals(scored: Scored, sha256: str, queries: Sequence[QueryScores]) -> Mapping[str, Interval]:
    """The intervals that the report has on just these queries; decisive flips may be counted by another noise floor."""
    panel = scored.panels[sha256]
    known = panel.report.intervals if panel.is_whole and len(queries) == len(panel.queries) else {}
    return {name: ends for name, ends in known.items() if name != "decisive_flips"}


def _is_of_vectors(metric: str) -> bool:
    return metric.startswith("cosine_") or metric == "similarity_spearman"


def _order(
    task: str, measured: Sequence[Mapping[str, QueryTerms]], points: Sequence[Mapping[str, float]]
) -> Iterator[str]:
    """Every metric that some artefact has, in the order of the report."""
    found = {name for each in (*measured, *points) for name in each}
    return (name for kind, names in METRICS.items() if kind.value == task for name in names if name in found)


def _metric(
    name: str,
    measured: Sequence[Mapping[str, QueryTerms]],
    points: Sequence[Mapping[str, float]],
    known: Sequence[Mapping[str, Interval]],
    baseline: int,
) -> ComparedMetric:
    terms = [each.get(name) for each in measured]
    values = [each.point if each else others.get(name) for each, others in zip(terms, points, strict=True)]
    return ComparedMetric(
        metric=name,
        values=tuple(values),
        intervals=tuple(
            (intervals.get(name) or bca_interval(each.terms, each.value)) if each else None
            for each, intervals in zip(terms, known, strict=True)
        ),
        differences=tuple(
            None if place == baseline else _difference(name, values[baseline], value, terms[baseline], own)
            for place, (value, own) in enumerate(zip(values, terms, strict=True))
        ),
    )


def _difference(
    metric: str, before: float | None, after: float | None, mine: QueryTerms | None, others: QueryTerms | None
) -> Difference | None:
    if before is None or after is None:
        return None
    size = _size(metric)
    value = float(size(after) - size(before))
    is_distance = not _is_higher_better(metric) and not metric.endswith("_drop") and metric != "decisive_flips"
    ratio = float(size(after) / size(before)) if is_distance and size(before) > 0 else None
    if mine is None or others is None or len(mine.terms) != len(others.terms):
        return Difference(value=value, interval=None, ratio=ratio, outcome="")
    width = mine.terms.shape[1]
    interval = bca_interval(
        np.hstack([mine.terms, others.terms]),
        lambda sums: size(others.value(sums[width:])) - size(mine.value(sums[:width])),
    )
    return Difference(value=value, interval=interval, ratio=ratio, outcome=_outcome(metric, interval))


def _outcome(metric: str, interval: Interval | None) -> str:
    if interval is None:  # of a single query
        return "undecided"
    if max(abs(interval.low), abs(interval.high)) <= _ROUNDING:
        return "equal"
    if interval.low <= 0 <= interval.high:
        return "undecided"
    return "better" if (interval.low > 0) == _is_higher_better(metric) else "worse"
