"""The suite `score`: pairs a second of the reference runtime against the official loop, on the demo reranker."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from qtool.inputs.builtin import find_panel
from tests.bench.goals import Goal, Jobs, Measured, faster, qtool

_MODEL = "qtool-demo-reranker"
_PANELS = ("demo-text", "demo-mixed", "demo-image")
_ALL, _ONE = "5,040 pairs", "start"
"""What is scored: every pair of the three panels, a third of them text, and one query, which tells what the start costs."""


def score_jobs(folder: Path, _shapes: list[str]) -> Jobs:
    """Both score the same panel, as whole processes; each writes a line for each pair."""
    panel = _write_panel(folder / "score-panel.jsonl")
    jobs: Jobs = {}
    for name, queries in ((_ONE, "1"), (_ALL, "360")):
        ours, theirs = (str(_output(folder, f"{who}-{queries}")) for who in ("qtool", "official"))
        jobs[f"{name} qtool"] = qtool("score", _MODEL, "--panel", panel, "--limit", queries, "-o", ours, "--force")
        official = ["-m", "tests.bench.official_loop", _MODEL, panel, queries, theirs]
        jobs[f"{name} official"] = [sys.executable, *official]
    return jobs


def score_goals(folder: Path) -> list[Goal]:
    """Speed against the official loop, and the same scores."""
    ours, theirs = f"{_ALL} qtool", f"{_ALL} official"
    both = (ours, theirs, f"{_ONE} qtool", f"{_ONE} official")
    return [
        faster("qtool over the official loop, whole processes", theirs, ours, 4),
        Goal("the same without the start, at least 4 times faster",
             lambda m: _beyond_start(m, "official") / _beyond_start(m, "qtool"), both, least=4),
        Goal("largest difference of log-odds, in units of 1e-4, at most 1", lambda _: 1e4 * _difference(folder),
             (ours, theirs), most=1),
        *(Goal(f"pairs a second beyond the start, {who}", lambda m, who=who: 5040 / _beyond_start(m, who), both)
          for who in ("qtool", "official")),
    ]  # fmt: skip


def _beyond_start(measured: Measured, who: str) -> float:
    return measured[f"{_ALL} {who}"].seconds - measured[f"{_ONE} {who}"].seconds


def _write_panel(path: Path) -> str:
    path.write_text("".join(f"{line}\n" for line in _lines()))
    return str(path)


def _lines() -> Iterator[str]:
    for panel in _PANELS:
        for line in find_panel(panel).read_text().splitlines()[1:]:
            query = json.loads(line)
            yield json.dumps({**query, "id": f"{panel} {query['id']}"})


def _difference(folder: Path) -> float:
    ours, theirs = (_scores(_output(folder, f"{who}-360")) for who in ("qtool", "official"))
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def _scores(path: Path) -> list[float]:
    return [json.loads(line)["log_odds"] for line in path.read_text().splitlines()]


def _output(folder: Path, name: str) -> Path:
    return folder / f"scores-{name}.jsonl"
