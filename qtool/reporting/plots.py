"""The plots of a report, as SVG: the gates, the differences, the modalities, the layers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

from qtool.checks.stage import TensorError
from qtool.reporting.words import MetricRow, interval, number
from qtool.verify.report import NoiseFloor, PanelReport, Report

# Drawings as SVG: a frame with axes, and what is drawn inside it. Colours are CSS classes of the page, so that they follow
# its light and dark scheme; every text is escaped here.


WIDTH: Final = 360
"""Of every drawing, in pixels: a phone shows it unscaled, so that 11-pixel letters stay readable."""
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 40


@dataclass(frozen=True)
class Axis:
    """A range of numbers mapped to a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round numbers inside the range, 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
        return [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Frame:
    """A plot's area between its two axes."""

    x: Axis
    y: Axis
    height: int

    @classmethod
    def around(cls, x: tuple[float, float], y: tuple[float, float], height: int = 260) -> Frame:
        """A frame of the usual width that holds both ranges; an empty range is widened."""
        return cls(Axis(*_wide(x), LEFT, WIDTH - RIGHT), Axis(*_wide(y), height - BOTTOM, TOP), height)

    def axes(self, x_title: str, y_title: str, *, whole: str = "") -> Markup:
        """Grid, numbers and titles; an axis named in `whole` gets whole numbers only."""
        below = self.height - BOTTOM
        across, up = (
            [value for value in axis.ticks() if name not in whole or value == int(value)]
            for name, axis in (("x", self.x), ("y", self.y))
        )
        parts = [line((LEFT, self.y.at(v)), (WIDTH - RIGHT, self.y.at(v)), "grid") for v in up]
        parts += [line((LEFT, below), (WIDTH - RIGHT, below), "axis")]
        parts += [text(LEFT - 6, self.y.at(v) + 4, f"{v:.10g}", "end") for v in up]
        parts += [text(self.x.at(v), below + 15, f"{v:.10g}") for v in across]
        parts += [text((LEFT + WIDTH - RIGHT) / 2, self.height - 6, x_title, kind="title")]
        middle = (TOP + below) / 2
        turned = Markup(
            '<text class="title" text-anchor="middle" transform="translate(11 {:.1f}) rotate(-90)">{}</text>'
        )
        return join([*parts, turned.format(middle, y_title)])

    def dots(self, points: Iterable[tuple[float, float]], kind: str) -> Markup:
        """One path for all points; those on the same pixel are drawn once, so that the size is bounded."""
        places = sorted({(round(self.x.at(x)), round(self.y.at(y))) for x, y in points})
        path = Markup("").join(Markup("M{} {}h0").format(x, y) for x, y in places)
        return Markup('<path class="dots {}" d="{}"/>').format(kind, path) if places else Markup("")


def drawing(title: str, description: str, height: int, *parts: Markup) -> Markup:
    """A whole SVG element, with a title and a description for screen readers."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>')
    return head.format(WIDTH, height, title, description) + join(parts) + Markup("</svg>")


def line(start: tuple[float, float], end: tuple[float, float], kind: str) -> Markup:
    """A straight line."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, *start, *end)


def path(points: Iterable[tuple[float, float]], kind: str) -> Markup:
    """Straight lines through the points."""
    steps = Markup("L").join(Markup("{:.1f} {:.1f}").format(x, y) for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(kind, steps)


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> Markup:
    """A filled rectangle; the title shows under a pointer."""
    shape = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
    return shape.format(kind, x, y, max(width, 0), max(height, 0), _title(title))


def ring(x: float, y: float, kind: str, title: str) -> Markup:
    """A small circle around a point; the title shows under a pointer."""
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5">{}</circle>').format(kind, x, y, _title(title))


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "tick") -> Markup:
    """A line of text."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def join(parts: Iterable[Markup]) -> Markup:
    """The parts one after the other."""
    return Markup("").join(parts)


def _title(words: str) -> Markup:
    return Markup("<title>{}</title>").format(words) if words else escape("")


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if high > low:
        return low, high
    pad = abs(low) * 0.1 or 1.0
    return low - pad, high + pad


# The plots. They show all pairs and all layers, never a sample; without numbers there is no plot (None).


_BINS: Final = 41
_HEIGHT: Final = 260
_ROW: Final = 40


def differences(panel: PanelReport, unit: str, noise: NoiseFloor | None) -> Markup | None:
    """Every pair: the reference's score across, artefact minus reference up; None where all scores are equal."""
    scores = _finite(panel)
    deltas = [artefact - reference for reference, artefact in scores]
    if not any(deltas):
        return None
    reach = max(*map(abs, deltas), noise.p99 if noise else 0) * 1.06
    across = [reference for reference, _ in scores]
    frame = Frame.around((min(across), max(across)), (-reach, reach))
    band = []
    if noise:
        top, bottom = frame.y.at(noise.p99), frame.y.at(-noise.p99)
        title = f"noise of {noise.dtype}, p99: {number(noise.p99)}"
        band.append(box(LEFT, top, frame.x.end - LEFT, bottom - top, "noise", title))
    worst = [
        ring(frame.x.at(pair.reference), frame.y.at(pair.delta), "worst", f"{pair.query} ⟶ {pair.document}")
        for pair in panel.worst
        if math.isfinite(pair.reference) and math.isfinite(pair.delta)
    ]
    zero = line((LEFT, frame.y.at(0)), (frame.x.end, frame.y.at(0)), "zero")
    axes = frame.axes(f"reference, {unit}", f"Δ, {unit}")
    description = (
        f"{len(scores)} pairs, Δ between {number(min(deltas))} and {number(max(deltas))}; the worst are ringed."
    )
    dots = frame.dots(zip(across, deltas, strict=True), "a")
    return drawing(f"Δ of {panel.name} against the reference", description, _HEIGHT, *band, axes, zero, dots, *worst)


_GATE: Final = 58
"""Pixels of a gate's row: its name and numbers, then its line."""


def gates(rows: Sequence[MetricRow], name: str) -> Markup | None:
    """Each gate on a line of its own scale: the range that is allowed, the interval, the value; None without a number."""
    known = [row for row in rows if row.is_gated and row.value is not None and math.isfinite(row.value)]
    if not known:
        return None
    parts = [part for place, row in enumerate(known) for part in _gate(row, row.value or 0.0, TOP + _GATE * place)]
    described = "; ".join(
        f"{row.name} {number(row.value)} {interval(row.ends)} {row.bound}: {row.outcome}" for row in known
    )
    return drawing(f"Gates on {name}", described, TOP + _GATE * len(known) + 4, *parts)


def _gate(row: MetricRow, value: float, top: float) -> Iterator[Markup]:
    start, end, middle = 8.0, WIDTH - 8.0, top + 30
    ends = [value] + ([row.ends.low, row.ends.high] if row.ends else [])
    bounds = [bound for bound in (row.low, row.high) if bound is not None]
    low, high = min(ends + bounds), max(ends + bounds)
    pad = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    axis = Axis(low - pad, high + pad, start, end)
    left = axis.at(row.low) if row.low is not None else start
    right = axis.at(row.high) if row.high is not None else end
    yield text(start, top + 14, row.name, "start", "name")
    yield text(end, top + 14, f"{number(value)} {interval(row.ends)}", "end", "tick")
    yield box(start, middle - 6, end - start, 12, "track")
    yield box(left, middle - 6, right - left, 12, "allowed", f"allowed: {row.bound}")
    for bound in bounds:
        yield line((axis.at(bound), middle - 9), (axis.at(bound), middle + 9), "limit")
        anchor = "start" if axis.at(bound) < WIDTH / 4 else "end" if axis.at(bound) > WIDTH * 3 / 4 else "middle"
        yield text(axis.at(bound), middle + 19, row.bound if len(bounds) == 1 else f"{bound:g}", anchor)
    if row.ends:
        first, last = axis.at(row.ends.low), axis.at(row.ends.high)
        yield line((first, middle), (last, middle), "span")
        yield from (line((edge, middle - 4), (edge, middle + 4), "span") for edge in (first, last))
    yield Markup('<circle class="value {}" cx="{:.1f}" cy="{:.1f}" r="5">{}</circle>').format(
        row.outcome, axis.at(value), middle, _title(f"{row.name}: {row.outcome}")
    )


def histogram(panel: PanelReport, unit: str, noise: NoiseFloor | None) -> Markup | None:
    """How many pairs differ by how much, with the noise floor (p99) of the reference behind them."""
    deltas = [artefact - reference for reference, artefact in _finite(panel)]
    if not any(deltas):
        return None
    reach = max(*map(abs, deltas), noise.p99 if noise else 0)
    counts = [0] * _BINS
    for delta in deltas:
        counts[min(int((delta + reach) / (2 * reach) * _BINS), _BINS - 1)] += 1
    frame = Frame.around((-reach, reach), (0, max(counts)))
    parts = [_noise_band(frame, noise)] if noise else []
    parts.append(frame.axes(f"artefact minus reference, {unit}", "pairs", whole="y"))
    for index, count in enumerate(counts):
        if count:
            parts.append(_bar(frame, reach, index, count))
    description = f"{len(deltas)} differences between {number(min(deltas))} and {number(max(deltas))}."
    return drawing(f"Differences of {panel.name}", description, _HEIGHT, *parts)


def _bar(frame: Frame, reach: float, index: int, count: int) -> Markup:
    low = -reach + 2 * reach * index / _BINS
    left, right, top = frame.x.at(low), frame.x.at(low + 2 * reach / _BINS), frame.y.at(count)
    title = f"{number(low)} … {number(low + 2 * reach / _BINS)}: {count}"
    return box(left + 0.5, top, right - left - 1, frame.y.start - top, "a", title)


def _noise_band(frame: Frame, noise: NoiseFloor) -> Markup:
    left, right = frame.x.at(-noise.p99), frame.x.at(noise.p99)
    return box(
        left, TOP, right - left, frame.y.start - TOP, "noise", f"noise of {noise.dtype}, p99: {number(noise.p99)}"
    )


def modalities(report: Report) -> Markup | None:
    """Each panel's distances by what its pairs hold: a bar of the RMSE, a whisker to the 95th percentile.

    None where there is one kind only, or no distance.
    """
    rows = [
        (panel.name, modality, *_distances(values))
        for panel in report.panels
        for modality, values in panel.by_modality.items()
        if _distances(values)[0] is not None
    ]
    if len(rows) < 2 or not any(rmse for _, _, rmse, _ in rows):
        return None
    height = TOP + _ROW * len(rows) + BOTTOM
    reach = max(value for _, _, *values in rows for value in values if value is not None)
    frame = Frame.around((0, reach * 1.02 or 1.0), (0, 1), height)
    parts = [_modality(frame, TOP + _ROW * place, *row) for place, row in enumerate(rows)]
    ticks = [text(frame.x.at(value), height - BOTTOM + 15, f"{value:.10g}") for value in frame.x.ticks()]
    title = text((LEFT + WIDTH) / 2, height - 6, "|Δ|, artefact minus reference", kind="title")
    description = "; ".join(f"{name}, {kind}: RMSE {number(rmse)}, p95 {number(p95)}" for name, kind, rmse, p95 in rows)
    below = line((LEFT, height - BOTTOM), (WIDTH - RIGHT, height - BOTTOM), "axis")
    return drawing("Differences by modality", description, height, below, *parts, *ticks, title)


def _modality(frame: Frame, top: float, panel: str, modality: str, rmse: float | None, p95: float | None) -> Markup:
    start, middle = frame.x.start, top + 26
    parts = [
        text(start, top + 14, f"{panel} · {modality}", "start", "name"),
        text(WIDTH - RIGHT, top + 14, number(rmse), "end", "tick"),
        box(start, top + 20, frame.x.at(rmse or 0) - start, 12, "a", f"RMSE {number(rmse)}, p95 {number(p95)}"),
    ]
    if p95 is not None:
        end = frame.x.at(p95)
        parts += [
            line((start, middle), (end, middle), "whisker"),
            line((end, middle - 5), (end, middle + 5), "whisker"),
        ]
    return join(parts)


def _distances(values: Mapping[str, float]) -> tuple[float | None, float | None]:
    def ending(suffix: str) -> float | None:
        return next((v for name, v in values.items() if name.endswith(suffix) and math.isfinite(v)), None)

    return ending("_rmse"), ending("_p95")


def layers(weights: Sequence[TensorError]) -> list[tuple[str, Markup]]:
    """For each stack of layers its name and plot: the relative error of each tensor by layer, and what its format allows.

    A stack without an error has no plot.
    """
    stacks: dict[str, list[tuple[int, TensorError]]] = defaultdict(list)
    for tensor in weights:
        found = re.match(r"(.*?)\.(\d+)\.", tensor.tensor)
        if found and math.isfinite(tensor.relative_error):
            stacks[found[1]].append((int(found[2]), tensor))
    changed = {name: tensors for name, tensors in stacks.items() if any(each.relative_error for _, each in tensors)}
    return [(name, _stack(name, tensors)) for name, tensors in changed.items()]


def _stack(name: str, tensors: Sequence[tuple[int, TensorError]]) -> Markup:
    last = max(layer for layer, _ in tensors)
    allowed: dict[int, float] = defaultdict(float)
    for layer, tensor in tensors:
        allowed[layer] = max(allowed[layer], tensor.bound)
    top = max(*(tensor.relative_error for _, tensor in tensors), *allowed.values())
    frame = Frame.around((-0.5, last + 0.5), (0, top * 1.08 or 1.0))
    bound = [
        (frame.x.at(layer + side), frame.y.at(allowed[layer])) for layer in sorted(allowed) for side in (-0.5, 0.5)
    ]
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for layer, tensor in tensors:
        groups[_group(tensor)].append((layer + _SHIFT[_group(tensor)], tensor.relative_error))
    description = f"{len(tensors)} tensors of {last + 1} layers, errors up to {number(max(t.relative_error for _, t in tensors))}."
    dots = [frame.dots(points, group) for group, points in groups.items()]
    axes = frame.axes("layer", "relative error", whole="x")
    return drawing(f"Weights of {name}", description, _HEIGHT, axes, path(bound, "bound"), *dots)


_SHIFT: Final = {"attention": -0.15, "mlp": 0.15, "other": 0.0, "above": 0.0}


def _group(tensor: TensorError) -> str:
    if tensor.relative_error > tensor.bound:
        return "above"
    if "attn" in tensor.tensor:
        return "attention"
    return "mlp" if "mlp" in tensor.tensor else "other"


def _finite(panel: PanelReport) -> list[tuple[float, float]]:
    return [scores for scores in panel.scores if all(map(math.isfinite, scores))]
