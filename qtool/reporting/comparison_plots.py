"""The plots of a comparison, as SVG: how far each artefact has drifted, and how each differs from the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from markupsafe import Markup

from qtool.reporting.plots import BOTTOM, RIGHT, TOP, WIDTH, Axis, box, drawing, line, text
from qtool.reporting.words import DRIFTS, change, interval, number
from qtool.verify.metrics import Interval
from qtool.verify.paired import ComparedMetric, ComparedPanel, Comparison

_START: Final = 8.0
_BAR: Final = 12
_ARTEFACT: Final = 20 + 3 * (_BAR + 2) + 6
"""Pixels of an artefact: its name, then raw, centred and bias."""
_KINDS: Final = (("raw", "a"), ("centred", "b"), ("bias", "c"))
_ROW: Final = 44


def drifts(comparison: Comparison, panel: ComparedPanel, names: Sequence[str]) -> Markup | None:
    """A bar each for raw, centred and bias of every artefact, with their intervals; None where nothing has drifted."""
    rows = {row.metric: row for row in panel.metrics}
    known = [
        (kind, colour, rows[metric])
        for (kind, colour), metric in zip(_KINDS, DRIFTS[comparison.task], strict=True)
        if metric in rows
    ]
    largest = max((_reach(row) for _, _, row in known), default=0.0)
    if largest == 0:
        return None
    height = TOP + _ARTEFACT * len(names) + BOTTOM
    axis = Axis(0, largest * 1.04, _START, WIDTH - RIGHT)
    parts = [
        part
        for place, name in enumerate(names)
        for part in _artefact(
            axis, TOP + _ARTEFACT * place, name, [(kind, colour, *_bar(row, place)) for kind, colour, row in known]
        )
    ]
    below = height - BOTTOM
    parts.append(line((_START, below), (WIDTH - RIGHT, below), "axis"))
    parts += [text(axis.at(value), below + 15, f"{value:.10g}") for value in axis.ticks()]
    parts.append(text((_START + WIDTH) / 2, height - 6, f"{DRIFTS[comparison.task][0]} and its parts", kind="title"))
    described = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {number(row.values[place])}" for kind, _, row in known)
        for place, name in enumerate(names)
    )
    return drawing(f"Drift on {panel.name}", described, height, *parts)


def _bar(row: ComparedMetric, place: int) -> tuple[float | None, Interval | None]:
    """The length of a bar and its whisker; a bias is drawn without its sign."""
    value, ends = row.values[place], row.intervals[place]
    if value is None or value >= 0 or ends is None:
        return None if value is None else abs(value), ends
    return -value, Interval(-ends.high, -ends.low)


def _reach(row: ComparedMetric) -> float:
    bars = (_bar(row, place) for place in range(len(row.values)))
    return max((max(value, ends.high if ends else 0.0) for value, ends in bars if value is not None), default=0.0)


def _artefact(
    axis: Axis, top: float, name: str, bars: Sequence[tuple[str, str, float | None, Interval | None]]
) -> Iterator[Markup]:
    yield text(_START, top + 14, name, "start", "name")
    shown = " · ".join(f"{kind} {number(value)}" for kind, _, value, _ in bars)
    yield text(WIDTH - RIGHT, top + 14, shown, "end", "tick")
    for place, (kind, colour, value, ends) in enumerate(bars):
        if value is None:
            continue
        level = top + 20 + place * (_BAR + 2)
        yield box(
            _START,
            level,
            axis.at(value) - _START,
            _BAR,
            colour,
            f"{name}: {kind} {number(value)} {interval(ends)}".rstrip(),
        )
        if ends:
            middle = level + _BAR / 2
            first, last = axis.at(max(ends.low, 0)), axis.at(max(ends.high, 0))
            yield line((first, middle), (last, middle), "span")
            yield from (line((edge, middle - 4), (edge, middle + 4), "span") for edge in (first, last))


def differences(panel: ComparedPanel, names: Sequence[str], metrics: Sequence[str]) -> Markup | None:
    """Each metric of each artefact on a line of its own scale, the baseline in the middle; None where there is no interval."""
    rows = [
        (row.metric, name, difference.value, difference.interval, difference.outcome)
        for row in panel.metrics
        if row.metric in metrics
        for name, difference in zip(names, row.differences, strict=True)
        if difference is not None and difference.interval is not None and math.isfinite(difference.value)
    ]
    if not rows:
        return None
    parts = [part for place, row in enumerate(rows) for part in _difference(TOP + _ROW * place, *row)]
    described = "; ".join(
        f"{metric}, {name}: {change(value)} {interval(ends)} {outcome}" for metric, name, value, ends, outcome in rows
    )
    return drawing(f"Differences on {panel.name}", described, TOP + _ROW * len(rows) + 4, *parts)


TONES: Final = {"better": "pass", "worse": "fail", "equal": "skipped", "undecided": "inconclusive"}
"""The colour of each outcome, as a class of the page."""


def _difference(
    top: float, metric: str, name: str, value: float, ends: Interval | None, outcome: str
) -> Iterator[Markup]:
    ends = ends or Interval(value, value)
    reach = max(abs(value), abs(ends.low), abs(ends.high)) * 1.15 or 1.0
    axis, middle = Axis(-reach, reach, _START, WIDTH - _START), top + 29
    yield text(_START, top + 14, f"{metric} · {name}", "start", "name")
    yield text(WIDTH - _START, top + 14, change(value), "end", "tick")
    yield box(_START, middle - 6, WIDTH - 2 * _START, 12, "track")
    yield line((axis.at(0), middle - 9), (axis.at(0), middle + 9), "zero")
    first, last = axis.at(ends.low), axis.at(ends.high)
    yield line((first, middle), (last, middle), "span")
    yield from (line((edge, middle - 4), (edge, middle + 4), "span") for edge in (first, last))
    title = f"{metric}, {name}: {change(value)} {interval(ends)} {outcome}"
    yield Markup('<circle class="value {}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>').format(
        TONES.get(outcome, "skipped"), axis.at(value), middle, title
    )
