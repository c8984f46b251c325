"""Which queries of several reports are the same: reports of one reference, taken apart into queries, shards joined."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from qtool.errors import UsageError
from qtool.inputs.panels import PanelShard
from qtool.scoring.scorer import LARGEST_LOG_ODDS
from qtool.verify.conclude import decisive_margin
from qtool.verify.metrics import METRICS, QueryScores
from qtool.verify.report import PanelReport, Report, Side

_SHARD: Final = "shard"
_SAME_SCORES: Final = 1e-3
"""How far the reference's scores of a pair may differ between two reports: a hundred times float32's rounding."""
_LARGEST: Final = 1 << 60
"""Bytes or weights."""
_HASH_SHOWN: Final = 12


@dataclass(frozen=True)
class PanelQueries:
    """The queries of a panel that an artefact answered, by their place in the panel.

    `is_whole` says that the metrics of `report` are of just these queries: they are no join of shards.
    """

    report: PanelReport
    queries: Mapping[int, QueryScores]
    is_whole: bool = True


@dataclass(frozen=True)
class Scored:
    """An artefact, its report (of shards, the first) with its source, and its queries by the hash of each panel."""

    sources: tuple[str, ...]
    report: Report
    panels: Mapping[str, PanelQueries]

    @property
    def side(self) -> Side:
        """The artefact."""
        return self.report.artefact


def scored_artefacts(reports: Sequence[tuple[str, Report]]) -> list[Scored]:
    """The artefacts of the reports, at least two, shards joined. Raises UsageError where they cannot be compared."""
    found: dict[str, Scored] = {}
    for number, (source, report) in enumerate(reports):
        scored = _scored(source, report)
        key = _key_of_shard(report) or f"report {number}"
        found[key] = _joined(found[key], scored) if key in found else scored
    artefacts = list(found.values())
    if len(artefacts) < 2:
        names = f": {artefacts[0].side.name}" if artefacts else ""
        raise UsageError(
            f"A comparison needs two artefacts, and these reports are of {len(artefacts) or 'none'}{names}.",
            "Pass the reports of two or more artefacts.",
        )
    for other in artefacts[1:]:
        _check_alike(artefacts[0], other)
    return artefacts


def _scored(source: str, report: Report) -> Scored:
    if not report.panels:
        raise UsageError(
            f"Nothing was scored in {source}: its verdict is {report.verdict.value}.",
            "Compare reports with scores; --keep-going scores what an earlier stage found broken.",
        )
    sizes = (report.artefact.nbytes, report.reference.nbytes, report.reference.parameters)
    if report.task not in [task.value for task in METRICS] or not all(
        0 <= size <= _LARGEST for size in sizes if size is not None
    ):
        raise UsageError(f"{source} is damaged: its task is {report.task}, its sizes are {_shown(sizes)}.")
    return Scored((source,), report, {panel.sha256: _queries(source, report, panel) for panel in report.panels})


def _shown(sizes: Sequence[int | None]) -> str:
    return ", ".join(
        "not known" if size is None else f"{size:.4g}" if abs(size) <= _LARGEST else "too large" for size in sizes
    )


def _queries(source: str, report: Report, panel: PanelReport) -> PanelQueries:
    if panel.scores and not panel.documents:
        raise UsageError(
            f"{source} does not say which scores belong to which query: an older qtool wrote it.",
            "Verify again with --force; answers in the cache are not computed again.",
        )
    lengths = {len(panel.scores), sum(panel.documents), len(panel.labels) or len(panel.scores)}
    if (
        len(lengths) > 1
        or len(panel.vector_errors) not in (0, len(panel.documents))
        or min(panel.documents, default=1) < 1
    ):
        raise UsageError(f"{source} is damaged: panel {panel.name} has other numbers of scores, labels and documents.")
    numbers = [number for row in (*panel.scores, *panel.vector_errors) for number in row]
    if not all(abs(number) <= LARGEST_LOG_ODDS for number in numbers):
        raise UsageError(f"{source} is damaged: panel {panel.name} has scores beyond {LARGEST_LOG_ODDS:g}.")
    shard = _shard(source, report)
    first, step = (0, 1) if shard is None else (shard.index - 1, shard.count)
    return PanelQueries(
        panel, dict(zip(range(first, first + step * len(panel.documents), step), _split(panel), strict=True))
    )


def _split(panel: PanelReport) -> Iterator[QueryScores]:
    scores = np.array(panel.scores, dtype=np.float64).reshape(-1, 2)
    for place, end in enumerate(accumulate(panel.documents)):
        own = slice(end - panel.documents[place], end)
        labels = [label for label in panel.labels[own] if label is not None]
        yield QueryScores(
            reference=scores[own, 0],
            artefact=scores[own, 1],
            labels=np.array(labels) if labels and len(labels) == panel.documents[place] else None,
            vectors=panel.vector_errors[place] if panel.vector_errors else None,
        )


def _shard(source: str, report: Report) -> PanelShard | None:
    shard = report.settings.get(_SHARD)
    if shard is None:
        return None
    try:
        return PanelShard.parse(str(shard))
    except UsageError as error:
        raise UsageError(f"{source} is damaged: {error.message}", error.hint) from error


def _key_of_shard(report: Report) -> str | None:
    """Equal for the shards of one verification; None of a whole one."""
    if report.settings.get(_SHARD) is None:
        return None
    settings = {name: value for name, value in report.settings.items() if name != _SHARD}
    side = report.artefact
    return json.dumps([side.name, side.sha256, side.engine, side.numbers, settings], sort_keys=True, default=str)


def _joined(one: Scored, other: Scored) -> Scored:
    """Two shards as one artefact. Each has centred its vectors by its own mean, so that only the raw sums can be joined."""
    panels = dict(one.panels)
    for sha256, added in other.panels.items():
        mine = panels.get(sha256)
        if mine is None:
            panels[sha256] = added
            continue
        if mine.queries.keys() & added.queries.keys():
            raise UsageError(
                f"{one.sources[0]} and {other.sources[0]} hold the same shard.", "Pass each shard of a run once."
            )
        panels[sha256] = PanelQueries(mine.report, {**mine.queries, **added.queries}, is_whole=False)
    return Scored((*one.sources, *other.sources), one.report, panels)


def _check_alike(one: Scored, other: Scored) -> None:
    names = one.sources[0], other.sources[0]
    mine, theirs = one.report, other.report
    if mine.task != theirs.task:
        raise UsageError(
            f"{names[0]} is about the task {mine.task} and {names[1]} about {theirs.task}: they share no metric.",
            "Compare artefacts of one task.",
        )
    if mine.reference.sha256 != theirs.reference.sha256:
        shown = [
            f"{side.name} (sha256 {(side.sha256 or 'not known')[:_HASH_SHOWN]})"
            for side in (mine.reference, theirs.reference)
        ]
        raise UsageError(
            f"{names[0]} and {names[1]} are about different references: {shown[0]} and {shown[1]}.",
            "Verify both artefacts against the same reference.",
        )
    if mine.reference.prompt_sha256 != theirs.reference.prompt_sha256:
        raise UsageError(
            f"{names[0]} and {names[1]} were made with different prompts of the reference.",
            "Verify both artefacts with the same version of qtool.",
        )
    hashes = {panel.name: panel.sha256 for panel in mine.panels}
    for panel in theirs.panels:
        if hashes.get(panel.name, panel.sha256) != panel.sha256:
            raise UsageError(
                f"Panel {panel.name} is not the same in {names[0]} and {names[1]}: its sha256 differs.",
                "Verify both artefacts on the same panel.",
            )


def common_queries(artefacts: Sequence[Scored], warnings: list[str]) -> Mapping[str, Sequence[int]]:
    """The places of the queries that all artefacts answered, by panel; what was left out goes to `warnings`.

    Raises UsageError where there is none, or where the reference itself answered otherwise.
    """
    found: dict[str, Sequence[int]] = {}
    panels = {sha256: panel.report.name for each in artefacts for sha256, panel in each.panels.items()}
    for sha256, name in panels.items():
        having = [each.panels[sha256] for each in artefacts if sha256 in each.panels]
        places = sorted(set.intersection(*(set(panel.queries) for panel in having)))
        if len(having) < len(artefacts) or not places:
            warnings.append(f"Panel {name} is left out: not every artefact was scored on it.")
            continue
        if any(len(panel.queries) != len(places) for panel in having):
            most = max(len(panel.queries) for panel in having)
            warnings.append(
                f"Panel {name} is compared on {len(places)} of {most} queries: those that all reports have."
            )
        found[sha256] = places
    if not found:
        raise UsageError(
            "The reports have no query in common: they are about different panels, or different shards of them.",
            "Verify all artefacts with the same --panel, --limit and --shard.",
        )
    for other in artefacts[1:]:
        _check_reference(artefacts[0], other, found, warnings)
    for sha256, common in found.items():
        _check_vectors(artefacts, sha256, common, warnings)
    return found


def _check_reference(one: Scored, other: Scored, places: Mapping[str, Sequence[int]], warnings: list[str]) -> None:
    """The reference is the same model; its scores must be the same, too, for both distances to start at one point."""
    apart = 0.0
    for sha256, common in places.items():
        for place in common:
            mine, theirs = (each.panels[sha256].queries[place].reference for each in (one, other))
            if len(mine) != len(theirs):
                raise UsageError(f"{other.sources[0]} has other documents for a query of {one.sources[0]}.")
            apart = max(apart, float(np.abs(mine - theirs).max()))
    if apart <= _SAME_SCORES:
        return
    names = one.sources[0], other.sources[0]
    sides = one.report.reference, other.report.reference
    if (sides[0].engine, sides[0].numbers) != (sides[1].engine, sides[1].numbers):
        raise UsageError(
            f"The reference's own scores differ by up to {apart:.2g} between {names[0]} ({sides[0].numbers}, {sides[0].engine}) "
            f"and {names[1]} ({sides[1].numbers}, {sides[1].engine}).",
            "Verify both artefacts with the same --dtype, on the same device and version.",
        )
    warnings.append(f"The reference's own scores differ by up to {apart:.2g} between {names[0]} and {names[1]}.")


def has_means(artefacts: Sequence[Scored], sha256: str, places: Sequence[int]) -> bool:
    """Whether every report is on just these queries: vectors are centred by their mean over all of a report's items."""
    panels = [each.panels[sha256] for each in artefacts]
    return all(panel.is_whole and len(panel.queries) == len(places) for panel in panels)


def _check_vectors(artefacts: Sequence[Scored], sha256: str, places: Sequence[int], warnings: list[str]) -> None:
    panels = [each.panels[sha256] for each in artefacts]
    has_vectors = any(query.vectors for panel in panels for query in panel.queries.values())
    if has_vectors and not has_means(artefacts, sha256, places):
        warnings.append(
            f"Panel {panels[0].report.name} has no vector_rmse_centred, vector_bias and cosines here: they are means over "
            "the queries of whole reports. Join shards with `qtool merge-reports`, and use the same --limit."
        )


def margin_of(artefacts: Sequence[Scored], warnings: list[str]) -> float | None:
    """How far apart the reference must score two documents for their order to be decisive: one margin for all artefacts."""
    floors = [each.report.noise for each in artefacts if each.report.noise is not None]
    if not floors:
        return None
    most = max(floors, key=lambda noise: noise.pairs)
    if any(noise.p99 != most.p99 for noise in floors):
        warnings.append(
            f"The noise floors of the reports differ; decisive flips are counted by that of {most.pairs} pairs."
        )
    return decisive_margin(most)
