"""The suite `layers`: `qtool score --memory` against the whole model, on full-size shapes of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from qtool.inputs.builtin import find_panel
from tests.bench.goals import Goal, Jobs, qtool, within

_BUDGET: Final = 4000
"""Megabytes, for every shape."""

_QUERIES, _DOCUMENTS = 10, 10
_PANELS = ("demo-text", "demo-mixed")
_WHOLE, _LAYERS, _LARGE = "2B whole", "2B layer by layer", "8B layer by layer"


def layers_jobs(folder: Path, shapes: list[str]) -> Jobs:
    """All score the same 200 pairs, half of them with pictures, in float32."""
    panel = _write_panel(folder / "layers-panel.jsonl")
    jobs: Jobs = {}
    for name, options in (
        (_WHOLE, []),
        (_LAYERS, ["--memory", f"{_BUDGET}MB"]),
        (_LARGE, ["--memory", f"{_BUDGET}MB"]),
    ):
        shape = name[:2]
        if shape in shapes:
            output = ["-o", str(_output(folder, name)), "--force"]
            jobs[name] = qtool("score", str(folder / shape), "--panel", panel, *options, *output)
    return jobs


def layers_goals(folder: Path) -> list[Goal]:
    """Time against the whole model, memory within the budget, the same scores."""
    both = (_WHOLE, _LAYERS)
    return [
        Goal("2B: time layer by layer over whole, at most 1.3", lambda m: m[_LAYERS].seconds / m[_WHOLE].seconds, both,
             most=1.3),
        within(f"2B with --memory {_BUDGET}MB", _LAYERS, int(1.1 * _BUDGET)),
        within(f"8B with --memory {_BUDGET}MB", _LARGE, int(1.1 * _BUDGET)),
        Goal("2B: largest difference of log-odds, in units of 1e-5, at most 1", lambda _: 1e5 * _difference(folder), both,
             most=1),
        Goal("8B: time over 2B's, layer by layer", lambda m: m[_LARGE].seconds / m[_LAYERS].seconds, (_LAYERS, _LARGE)),
    ]  # fmt: skip


def _write_panel(path: Path) -> str:
    """Ten queries of each panel with ten documents each; pictures by their absolute paths."""
    with path.open("w") as file:
        for name in _PANELS:
            source = find_panel(name)
            for line in source.read_text().splitlines()[1 : _QUERIES + 1]:
                query = json.loads(line)
                query |= {"id": f"{name} {query['id']}", "documents": query["documents"][:_DOCUMENTS]}
                file.write(f"{json.dumps(query)}\n")
    return str(path)


def _difference(folder: Path) -> float:
    one, other = (
        [json.loads(line)["log_odds"] for line in _output(folder, name).read_text().splitlines()]
        for name in (_WHOLE, _LAYERS)
    )
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _output(folder: Path, name: str) -> Path:
    return folder / f"scores-{name.replace(' ', '-')}.jsonl"
