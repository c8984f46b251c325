"""The words and numbers of a report, the same in every form of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from qtool.console import human_size
from qtool.verify.conclude import RANKS, SCORES
from qtool.verify.gates import GateResult, Verdict
from qtool.verify.made import Made
from qtool.verify.metrics import METRICS, Interval
from qtool.verify.paired import Comparison
from qtool.verify.report import NoiseFloor, PanelReport, Report, Side

STAGE_COLUMNS: Final = ("stage", "outcome", "summary", "time")
METRIC_COLUMNS: Final = ("metric", "value", "interval", "bound", "outcome")
INTERVALS: Final = (
    "[low, high] is a 90 % confidence interval (BCa bootstrap over queries); each end is a one-sided 95 % bound."
)
APART: Final = (
    "rmse² = rmse_centred² + bias². One shift of all scores (bias) is another fault than a changed order: it moves "
    "thresholds and no ranking; rmse_centred is what is left without it."
)
DRIFTS: Final[Mapping[str, tuple[str, str, str]]] = {
    "rerank": ("log_odds_rmse", "log_odds_rmse_centred", "log_odds_bias"),
    "embed": ("vector_rmse", "vector_rmse_centred", "vector_bias"),
}
"""Raw, centred and bias of a task's answers."""
KEY_METRICS: Final[Mapping[str, tuple[str, ...]]] = {
    "rerank": (*DRIFTS["rerank"], "log_odds_p99", "kendall_tau", "top1_agreement", "decisive_flips", "ndcg10_drop"),
    "embed": (
        *(*DRIFTS["embed"], "cosine_p1", "similarity_rmse"),
        *("kendall_tau", "top1_agreement", "decisive_flips", "ndcg10_drop"),
    ),
}
"""What the console and the plots of a comparison show of a task; its files have all metrics."""
PAIRED: Final = (
    "[low, high] is a 90 % confidence interval of the difference to the baseline (BCa bootstrap over the queries that all "
    "answered). Better and worse: all of it is on that side of 0; undecided: it holds 0. Of bias and slope, the difference "
    "is that of their distances from 0 and from 1."
)
LABEL: Final = 22
"""Characters of an artefact's label at most."""
WEIGHTS: Final = "The relative error (Frobenius norm) of each dequantized weight against its source, worst first."
_MODELS: Final = {"rerank": "rerankers", "embed": "embedders"}
_JUDGED_BY_GATES: Final = (SCORES, RANKS)
_SETTINGS: Final = ("limit", "shard", "dtype", "noise_queries")


@dataclass(frozen=True)
class Concern:
    """Why a report is not a plain pass: `about` names the stage or gate, `sentence` says what was found."""

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


def change(value: float) -> str:
    """A difference as `number` shows it, with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def interval(ends: Interval | None) -> str:
    """Both ends, or nothing."""
    return "" if ends is None else f"[{number(ends.low)}, {number(ends.high)}]"


def bound(gate: GateResult) -> str:
    """What a gate allows."""
    return " ".join(f"{sign} {value:g}" for sign, value in (("≥", gate.min), ("≤", gate.max)) if value is not None)


def counted(number: int, noun: str) -> str:
    """A number of things: `1 pair`, `2 queries`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def size(panel: PanelReport) -> tuple[str, str]:
    """How many queries and pairs a panel has."""
    return counted(panel.queries, "query"), counted(panel.pairs, "pair")


def short_name(side: Side) -> str:
    """The last part of a folder, repository or address."""
    return re.split(r"[/\\]", side.name.rstrip("/\\"))[-1] or side.name


def compared(report: Report) -> str:
    """What the artefact was compared with, and as what."""
    models = _MODELS.get(report.task, report.task)
    return f"Compared with {short_name(report.reference)} as {models}."


def metric_names(report: Report) -> list[str]:
    """Every metric that some panel has, in the order of the task's; unknown ones come last."""
    found = dict.fromkeys(metric for panel in report.panels for metric in panel.metrics)
    known = next((names for task, names in METRICS.items() if task.value == report.task), ())
    return [name for name in known if name in found] + [name for name in found if name not in known]


@dataclass(frozen=True)
class MetricRow:
    """A metric of a panel as every form shows it; `outcome`, `low` and `high` are those of the gate held against it."""

    name: str
    value: float | None
    ends: Interval | None
    bound: str = ""
    outcome: str = ""
    reason: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def is_gated(self) -> bool:
        """Whether a gate is held against it."""
        return bool(self.outcome)

    @property
    def is_shortened(self) -> bool:
        """Whether it is of vectors cut to fewer dimensions."""
        return "_mrl" in self.name


def metric_rows(report: Report, panel: PanelReport) -> list[MetricRow]:
    """The gated metrics of a panel in the recipe's order, then its others in the task's order.

    Gates on metrics of the other task are left out.
    """
    foreign = {name for task, names in METRICS.items() if task.value != report.task for name in names} - set(
        metric_names(report)
    )
    gates = [gate for gate in report.gates if gate.panel == panel.name and gate.metric not in foreign]
    rows = [
        MetricRow(
            gate.metric, gate.value, gate.interval, bound(gate), gate.outcome.value, gate.reason, gate.min, gate.max
        )
        for gate in gates
    ]
    others = [name for name in metric_names(report) if name in panel.metrics and name not in {row.name for row in rows}]
    return rows + [MetricRow(name, panel.metrics[name], panel.intervals.get(name)) for name in others]


def has_centred(report: Report) -> bool:
    """Whether some panel has a distance without its bias, which older reports lack."""
    return any(name.endswith("_rmse_centred") for panel in report.panels for name in panel.metrics)


def gates_title(report: Report) -> str:
    """The heading of the metrics, whose bounds are a recipe's."""
    return f"Metrics and gates of the recipe {report.recipe}" if report.recipe else "Metrics and gates"


def verdict_title(report: Report, *, upper: bool = False) -> str:
    """The verdict in words; a pass without scores says what it is a pass of."""
    word = report.verdict.value.upper() if upper else report.verdict.value.capitalize()
    if report.panels or report.verdict is not Verdict.PASS:
        return word
    passed = [stage.name for stage in report.stages if stage.outcome.value == "pass"]
    return f"{word} ({_listed(passed)} only)" if passed else word


def sizes(report: Report) -> str:
    """Bytes of the reference's and the artefact's tensors; empty where one is not known."""
    before, after = report.reference.nbytes, report.artefact.nbytes
    if not before or after is None:
        return ""
    return f"{human_size(before)} before, {human_size(after)} after ({after / before:.0%})"


def made(made: Made | None) -> str:
    """The recipe, effort and data by which an artefact was made, else its format; empty where nothing is known."""
    if made is None:
        return ""
    data = f"{made.tokens:,} tokens of {made.data}" if made.data and made.tokens is not None else made.data
    how = [made.recipe or made.format, f"effort {made.effort}" if made.effort else "", data]
    return ", ".join(filter(None, how))


def weight(nbytes: int | None, bits_per_weight: float | None) -> str:
    """How large an artefact is; empty where nobody knows."""
    known = [
        human_size(nbytes) if nbytes is not None else "",
        f"{bits_per_weight:.2f} bits per weight" if bits_per_weight else "",
    ]
    return ", ".join(filter(None, known))


def labels(comparison: Comparison) -> list[str]:
    """Each artefact's number and the end of its name, in which several of one model differ; at most 22 characters."""
    return [_label(str(place), short_name(each.side)) for place, each in enumerate(comparison.artefacts, start=1)]


def _label(number: str, name: str) -> str:
    longest = LABEL - len(number) - 1
    return f"{number} {name if len(name) <= longest else f'…{name[1 - longest :]}'}"


def started(report: Report) -> str:
    """When the run began; empty where nobody knows."""
    return report.started.replace("T", " ").replace("+00:00", " UTC")


def answers(report: Report) -> list[str]:
    """For each role how many answers were computed, and how many came from elsewhere."""
    return [
        f"{each.role}: {each.asked:,} computed, {each.kept:,} from the cache or an earlier run"
        for each in report.answers
    ]


def noise_floor(noise: NoiseFloor) -> str:
    """What was measured of the reference in bf16."""
    return (
        f"Noise floor: the reference in {noise.dtype} differs from its own scores by median {number(noise.p50)}, "
        f"p95 {number(noise.p95)}, p99 {number(noise.p99)}, max {number(noise.max)} over {counted(noise.pairs, 'pair')}."
    )


def pairs(report: Report) -> str:
    """How many pairs were scored."""
    return counted(sum(panel.pairs for panel in report.panels), "pair")


def headline(report: Report) -> str:
    """What follows from the report, in one sentence."""
    failed = _stages(report, "fail")
    inconclusive = _stages(report, "inconclusive") if report.verdict is Verdict.INCONCLUSIVE else []
    parts = [f"{_listed(failed)} failed"] if failed else []
    parts += [f"{_listed(inconclusive)} {_are(len(inconclusive))} inconclusive"] if inconclusive else []
    if gates := _gates_sentence(report):
        parts.append(gates)
    elif report.panels:
        parts.append(f"{pairs(report)} compared; no gate applied")
    else:
        passed = [] if parts else _stages(report, "pass")
        parts += [f"{_listed(passed)} passed"] if passed else []
        parts.append("nothing was scored")
    return "; ".join(parts) + "."


def concerns(report: Report) -> list[Concern]:
    """What failed, then what is inconclusive: first stages, then gates, each with all panels of the same reason."""
    found = []
    for wanted in ("fail", "inconclusive"):
        named = _stages(report, wanted)
        found += [Concern(wanted, stage.name, stage.summary) for stage in report.stages if stage.name in named]
        panels: dict[tuple[str, str], list[str]] = {}
        for gate in report.gates:
            if gate.outcome.value == wanted:
                panels.setdefault((gate.metric, gate.reason), []).append(gate.panel)
        found += [
            Concern(wanted, f"{metric} on {_listed(names)}", reason) for (metric, reason), names in panels.items()
        ]
    return found


def settings(report: Report) -> str:
    """The settings of the run that the report does not show elsewhere."""
    return ", ".join(f"{name} {report.settings[name]}" for name in _SETTINGS if report.settings.get(name) is not None)


def _stages(report: Report, outcome: str) -> list[str]:
    """Names of the stages with that outcome, except those that only repeat an outcome of the gates."""
    judged = {gate.outcome.value for gate in report.gates}
    named = [stage.name for stage in report.stages if stage.outcome.value == outcome]
    return [name for name in named if not (outcome in judged and name in _JUDGED_BY_GATES)]


def _gates_sentence(report: Report) -> str:
    outcomes = [gate.outcome.value for gate in report.gates]
    failed, inconclusive, skipped = (outcomes.count(each) for each in ("fail", "inconclusive", "skipped"))
    judged = len(outcomes) - skipped
    if not judged:
        return ""
    rest = f"on {pairs(report)}" + (f", {skipped} skipped" if skipped else "")
    if failed:
        also = f", {inconclusive} inconclusive" if inconclusive else ""
        return f"{failed} of {counted(judged, 'gate')} failed{also} {rest}"
    if inconclusive:
        return f"{inconclusive} of {counted(judged, 'gate')} {_are(inconclusive)} inconclusive {rest}"
    return f"{f'all {judged} gates' if judged > 1 else 'the gate'} passed {rest}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
