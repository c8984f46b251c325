"""The words and numbers of a report, the same in every form of it.

Rule: an outcome always has a word, a number always as many digits as it can bear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from qtool.verify.gates import GateResult, Verdict
from qtool.verify.metrics import METRICS, Interval, label
from qtool.verify.report import Report, Side

_JUDGED_BY_GATES: Final = ("scores", "ranking")
_SETTINGS: Final = ("limit", "shard", "dtype", "noise_queries")


@dataclass(frozen=True)
class Concern:
    """Why a report is not a plain pass: `about` says which stage or gate, `sentence` what was found there."""

    outcome: str
    about: str
    sentence: str


def number(value: float | None) -> str:
    """Four decimals for what is near 1, less for what is large, an exponent for what would vanish."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}".removeprefix("-") if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.1e}" if abs(value) < 5e-4 else f"{value:.4f}"


def signed(value: float) -> str:
    """A score or a difference, always with its sign."""
    return f"{value:+.3f}" if abs(value) >= 1 else f"{value:+.4f}"


def interval(ends: Interval | None) -> str:
    """Both ends, or nothing."""
    return "" if ends is None else f"{number(ends.low)} … {number(ends.high)}"


def bound(gate: GateResult) -> str:
    """What a gate allows."""
    return " ".join(f"{sign} {value:g}" for sign, value in (("≥", gate.min), ("≤", gate.max)) if value is not None)


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours; nothing for no time."""
    if seconds < 0.05:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def short_name(side: Side) -> str:
    """The last part of a folder, repository or address."""
    return re.split(r"[/\\]", side.name.rstrip("/\\"))[-1] or side.name


def metric_names(report: Report) -> list[str]:
    """Every metric that some panel has, in the order of the task's; what the task does not know comes last."""
    found = dict.fromkeys(metric for panel in report.panels for metric in panel.metrics)
    known = next((names for task, names in METRICS.items() if task.value == report.task), ())
    return [name for name in known if name in found] + [name for name in found if name not in known]


def of_shortened(metrics: Iterable[str]) -> list[str]:
    """Those that speak of an embedder's vectors cut to their first dimensions."""
    return [metric for metric in metrics if "_mrl" in metric]


def pairs(report: Report) -> int:
    """How many pairs were scored."""
    return sum(panel.pairs for panel in report.panels)


def headline(report: Report) -> str:
    """What follows from the report, in one sentence."""
    open_ones = _stages(report, "inconclusive") if report.verdict is Verdict.INCONCLUSIVE else []
    parts = [
        f"{_listed(names)} {what}"
        for names, what in ((_stages(report, "fail"), "failed"), (open_ones, "stayed undecided"))
        if names
    ]
    if gates := _gates_sentence(report):
        parts.append(gates)
    elif report.panels:
        parts.append(f"{pairs(report)} pairs compared; no gate could be held against them")
    else:
        held = [] if parts else _stages(report, "pass")
        parts += [f"{_listed(held)} {'hold' if len(held) > 1 else 'holds'}"] if held else []
        parts.append("nothing was scored")
    return "; ".join(parts) + "."


def concerns(report: Report) -> list[Concern]:
    """What failed and then what stayed undecided: stages, then gates, with the panels of which the same is to say."""
    found = []
    for wanted in ("fail", "inconclusive"):
        named = _stages(report, wanted)
        found += [Concern(wanted, stage.name, stage.summary) for stage in report.stages if stage.name in named]
        panels: dict[tuple[str, str], list[str]] = {}
        for gate in report.gates:
            if gate.outcome.value == wanted:
                panels.setdefault((gate.metric, gate.reason), []).append(gate.panel)
        found += [
            Concern(wanted, f"{label(metric)} on {_listed(names)}", reason)
            for (metric, reason), names in panels.items()
        ]
    return found


def settings(report: Report) -> str:
    """How the run was set up, as far as it was set up at all and the report does not say it elsewhere."""
    return ", ".join(f"{name} {report.settings[name]}" for name in _SETTINGS if report.settings.get(name) is not None)


def _stages(report: Report, outcome: str) -> list[str]:
    """Names of the stages with that outcome, but for those that only say what the gates say."""
    judged = {gate.outcome.value for gate in report.gates}
    named = [stage.name for stage in report.stages if stage.outcome.value == outcome]
    return [name for name in named if not (outcome in judged and name in _JUDGED_BY_GATES)]


def _gates_sentence(report: Report) -> str:
    outcomes = [gate.outcome.value for gate in report.gates]
    judged = len(outcomes) - outcomes.count("skipped")
    if not judged:
        return ""
    rest = f"on {pairs(report)} pairs" + (f", {outcomes.count('skipped')} skipped" if "skipped" in outcomes else "")
    open_ones = f", {outcomes.count('inconclusive')} undecided" if "inconclusive" in outcomes else ""
    if "fail" in outcomes:
        return f"{outcomes.count('fail')} of {judged} gates failed{open_ones} {rest}"
    if open_ones:
        return f"{outcomes.count('inconclusive')} of {judged} gates stayed undecided {rest}"
    return f"{f'all {judged} gates hold' if judged > 1 else 'the gate holds'} {rest}"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
