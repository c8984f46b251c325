"""`--against CHECKOUT`: quantization and conversion of the 2B shape by this tree and by another one, interleaved."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bench.goals import Goal, Jobs
from tests.bench.suites import packed_2b

_HERE = Path(__file__).parents[2]
_RUN = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('qtool', run_name='__main__', alter_sys=True)"
)
_TYPES = ("f16", "q8_0", "nvfp4")
_KINDS = ("quantize", *_TYPES)

MOST_TIME, MOST_MEMORY = 1.05, 1.1
"""What this tree may take, in units of the other's."""


def against_jobs(folder: Path, other: Path) -> Jobs:
    """Each job twice, one after the other; both write `folder`/out."""
    jobs: Jobs = {}
    for kind in _KINDS:
        for name, tree in ((f"2B {kind}", _HERE), (f"2B {kind} there", other)):
            jobs[name] = [sys.executable, "-c", _RUN, str(tree.absolute()), *_arguments(kind, folder)]
    return jobs


def _arguments(kind: str, folder: Path) -> list[str]:
    out = str(folder / "out")
    if kind == "quantize":
        return ["quantize", str(folder / "2B"), "-o", out]
    source = packed_2b(folder) if kind == "nvfp4" else folder / "2B"
    return ["convert-gguf", str(source), "-o", out, "--outtype", kind, "--mmproj", "none"]


def against_goals() -> list[Goal]:
    """Time, processor time and memory of each job here over there."""
    goals = []
    for kind in _KINDS:
        here, there = needs = f"2B {kind}", f"2B {kind} there"
        goals += [
            Goal(
                f"{here}: time over there's, at most {MOST_TIME}",
                lambda m, here=here, there=there: m[here].seconds / m[there].seconds,
                needs,
                most=MOST_TIME,
            ),
            Goal(
                f"{here}: CPU time over there's",
                lambda m, here=here, there=there: m[here].cpu_seconds / m[there].cpu_seconds,
                needs,
            ),
            Goal(
                f"{here}: memory over there's, at most {MOST_MEMORY}",
                lambda m, here=here, there=there: m[here].peak_rss / m[there].peak_rss,
                needs,
                most=MOST_MEMORY,
            ),
        ]
    return goals
