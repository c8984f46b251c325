"""The page docs/quality.md, from the rows that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tests.bench_quality.recipes import ABOUT

Row = Mapping[str, Any]

INTRODUCTION: Final = """# Calibration quality

What each way of rounding costs in answers, on real models, measured by `make bench-quality` and written by
`python -m tests.bench_quality --page docs/quality.md`. Every model has the same bytes under every recipe: 4.5 bits a
quantized weight.

- A number is the root mean square of the change of the answers, over that under `max` on the same model: below 1 is
  closer to the reference than `max`. **Raw** counts everything, **centred** leaves out what all answers of the
  evaluation have in common, and **bias** is that common part, in the unit of the answer and not a ratio. One shift of
  all scores is another fault than a changed order. KL is the mean divergence of the next token's distribution.
- A **seed** is a function-identical twin: hidden, MLP and value dimensions in another order, so that every block of 16
  holds other weights and the model computes the same. It also draws other calibration texts. ± is the standard
  deviation over seeds; where one seed was run there is none.
- **bf16** is the same model computed in bf16: differences near it are noise that every engine makes.
- **predicted** is the gain over `max` that second moments alone predict for rounding with error feedback, before any
  weight is rounded (root mean square over the groups of the model); *centred* leaves out the mean of the inputs.
- Calibration and evaluation texts are disjoint: docstrings of different installed packages, licences and READMEs;
  for the demo models new training scenes and the shipped panels.
- The demo models flatter: their inputs have few directions. Read the prediction of your own model
  (`qtool calibrate --predict`) before you expect their numbers.
"""

TITLES: Final = {
    "demo-reranker": "Demo reranker",
    "demo-embedder": "Demo embedder",
    "minilm": "MiniLM, an encoder with real weights",
    "smollm2": "SmolLM2-135M, a decoder with real weights",
}
UNITS: Final = {"odds": "log-odds", "vector": "vector", "hidden": "last hidden state", "KL": "KL"}


@dataclass(frozen=True)
class Requirement:
    """A ratio to `max` (or, `over`, to a peer) that a recipe has to reach on a bed."""

    bed: str
    samples: int
    measure: str
    kind: str
    recipe: str
    most: float
    evaluations: str = "all"
    over: str = "max"


REQUIREMENTS: Final = (
    Requirement("demo-reranker", 256, "odds", "raw", "standard", 0.20),
    Requirement("demo-reranker", 256, "odds", "raw", "best", 0.15),
    Requirement("demo-reranker", 256, "odds", "raw", "standard", 0.25, "each"),
    Requirement("demo-reranker", 256, "odds", "raw", "best", 0.20, "each"),
    Requirement("demo-reranker", 256, "odds", "raw", "tuned 5.5", 0.85, over="standard"),
    Requirement("demo-embedder", 256, "vector", "raw", "standard", 0.15),
    Requirement("demo-embedder", 256, "vector", "raw", "best", 0.10),
    Requirement("minilm", 256, "vector", "raw", "standard", 0.56, "each"),
    Requirement("minilm", 1024, "vector", "raw", "standard", 0.48, "each"),
    Requirement("smollm2", 256, "odds", "centred", "standard", 0.45),
    Requirement("smollm2", 256, "hidden", "centred", "standard", 0.42),
    Requirement("smollm2", 256, "KL", "raw", "standard", 0.03),
    Requirement("smollm2", 256, "odds", "centred", "best", 0.40),
    Requirement("smollm2", 256, "hidden", "centred", "best", 0.38),
    Requirement("smollm2", 256, "KL", "raw", "best", 0.02),
    Requirement("smollm2", 256, "odds", "centred", "standard", 0.6, over="GPTQ"),
)


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Recipes", _recipes(rows), "## What was asked", _required(rows)]
    for bed, title in TITLES.items():
        for samples in sorted({row["samples"] for row in rows if row["bed"] == bed}):
            parts += [
                f"## {title}: {samples:,} samples",
                _tables([row for row in rows if (row["bed"], row["samples"]) == (bed, samples)]),
            ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _recipes(rows: Sequence[Row]) -> str:
    names = {row["recipe"] for row in rows}
    return _table(["recipe", "what it does"], [[name, about] for name, about in ABOUT.items() if name in names])


def _required(rows: Sequence[Row]) -> str:
    lines = []
    for each in REQUIREMENTS:
        found = [row for row in rows if (row["bed"], row["samples"]) == (each.bed, each.samples)]
        values = _ratios(found, each.recipe, each.measure, each.kind, each.over)
        whole = (
            {"together": _together(found, each)}
            if each.evaluations == "all"
            else {name: np.mean(v) for name, v in values.items()}
        )
        if not values or any(np.isnan(value) for value in whole.values()):
            lines.append([*_described(each), "not measured", ""])
            continue
        worst = max(whole.values())
        lines.append([*_described(each), f"{worst:.3f}", "yes" if worst <= each.most else "**no**"])
    return _table(["model", "answer", "recipe", "at most", "measured", "met"], lines)


def _described(each: Requirement) -> list[str]:
    where = "each evaluation" if each.evaluations == "each" else "all evaluations"
    over = "" if each.over == "max" else f", over {each.over}"
    answer = f"{UNITS[each.measure]}, {each.kind}, {where}{over}"
    return [f"{TITLES[each.bed].split(',')[0]}, {each.samples:,}", answer, each.recipe, f"{each.most:.2f}"]


def _together(rows: Sequence[Row], each: Requirement) -> float:
    """The ratio of the RMS over all evaluations, which have about the same number of answers; mean over seeds."""
    ratios = []
    for recipes in _by_seed(rows).values():
        if each.recipe in recipes and each.over in recipes:
            mine, theirs = (
                np.sqrt(np.mean([found[each.measure][each.kind] ** 2 for found in recipes[name]["drifts"].values()]))
                for name in (each.recipe, each.over)
            )
            ratios.append(mine / theirs)
    return float(np.mean(ratios)) if ratios else float("nan")


def _by_seed(rows: Iterable[Row]) -> dict[int, dict[str, Row]]:
    seeds: dict[int, dict[str, Row]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row["recipe"]] = row
    return seeds


def _ratios(rows: Sequence[Row], recipe: str, measure: str, kind: str, over: str = "max") -> dict[str, list[float]]:
    """By evaluation the ratio on each seed that has both recipes."""
    found: dict[str, list[float]] = {}
    for recipes in _by_seed(rows).values():
        if recipe in recipes and over in recipes:
            for evaluation, drifts in recipes[recipe]["drifts"].items():
                base = recipes[over]["drifts"][evaluation][measure][kind]
                found.setdefault(evaluation, []).append(drifts[measure][kind] / base)
    return found


def _tables(rows: Sequence[Row]) -> str:
    """What was run, and a table for each evaluation."""
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    tokens = [row["tokens"] for row in rows if row.get("tokens")]
    predicted = [row["predicted"] for row in rows if "predicted" in row]
    facts = [f"Seeds: {seeds}.", f"Evaluated: {rows[0]['evaluated']:,} answers each."]
    if tokens:
        facts.append(f"Calibration tokens: {np.mean(tokens):,.0f}.")
    if predicted:
        gain, centred = (np.mean([each[key] for each in predicted]) for key in ("gain", "centred"))
        facts.append(f"Predicted: {gain:.2f}, centred {centred:.2f}.")
    evaluations = dict.fromkeys(name for row in rows for name in row["drifts"])
    parts = [" ".join(facts)]
    for evaluation in evaluations:
        parts += [f"On *{evaluation}*:", _evaluation(rows, evaluation)]
    return "\n\n".join(parts)


def _evaluation(rows: Sequence[Row], evaluation: str) -> str:
    recipes = [name for name in ("bf16", *ABOUT) if name != "max" and any(row["recipe"] == name for row in rows)]
    measures = dict.fromkeys(name for row in rows for name in row["drifts"][evaluation])
    columns = [(evaluation, measure, kind) for measure in measures for kind in _kinds(measure)]
    heads = ["recipe", *(f"{UNITS[measure]} {kind}".rstrip() for _, measure, kind in columns), "CPU s"]
    lines = [["`max`, absolute", *(_absolute(rows, "max", *column) for column in columns), _seconds(rows, "max")]]
    lines += [[name, *(_cell(rows, name, *column) for column in columns), _seconds(rows, name)] for name in recipes]
    return _table(heads, lines)


def _kinds(measure: str) -> list[str]:
    return [""] if measure == "KL" else ["raw", "centred", "bias"]


def _absolute(rows: Sequence[Row], recipe: str, evaluation: str, measure: str, kind: str) -> str:
    values = [row["drifts"][evaluation][measure][kind or "raw"] for row in rows if row["recipe"] == recipe]
    return f"{np.mean(values):.3g}" if values else ""


def _cell(rows: Sequence[Row], recipe: str, evaluation: str, measure: str, kind: str) -> str:
    if kind == "bias":
        return _absolute(rows, recipe, evaluation, measure, kind)
    values = _ratios(rows, recipe, measure, kind or "raw").get(evaluation, [])
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _seconds(rows: Sequence[Row], recipe: str) -> str:
    values = [row["cpu_seconds"] for row in rows if row["recipe"] == recipe and "cpu_seconds" in row]
    return f"{np.mean(values):.0f}" if values else ""


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
