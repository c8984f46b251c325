"""`make bench`: whole processes on full-size checkpoints, against the tools that there are.

Everything of a suite runs interleaved in one go; the tables are what docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.bench.against import against_goals, against_jobs
from tests.bench.checkpoints import make_checkpoint
from tests.bench.goals import Goal, Jobs, Measured, source_bytes
from tests.bench.processes import Measurement, middle, run
from tests.bench.suites import SUITES


def measure(folder: Path, jobs: Jobs, rounds: int, unmeasured: Sequence[str]) -> dict[str, list[Measurement]]:
    """All jobs, round by round, after those that are `unmeasured`, which compile the kernels into numba's cache."""
    for name in unmeasured:
        clear(folder)
        run(jobs[name], folder / "log")
    runs: dict[str, list[Measurement]] = {name: [] for name in jobs}
    for number in range(1, rounds + 1):
        for name, command in jobs.items():
            clear(folder)
            runs[name].append(run(command, folder / "log"))
            print(f"round {number}  {name:20}  {runs[name][-1].seconds:8.2f} s", file=sys.stderr)
    clear(folder)
    return runs


def clear(folder: Path) -> None:
    """Remove what the last run wrote."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out.gguf").unlink(missing_ok=True)


def table(measured: Measured) -> str:
    """The medians as a Markdown table."""
    lines = ["| run | seconds | CPU seconds | peak RSS |", "|---|---:|---:|---:|"]
    for name, m in measured.items():
        lines.append(f"| {name} | {m.seconds:.1f} | {m.cpu_seconds:.1f} | {m.peak_rss / 1e6:,.0f} MB |")
    return "\n".join(lines)


def judged(goals: list[Goal], measured: Measured) -> str:
    """Each goal with its number and whether it was met."""
    lines = ["| goal | measured | met |", "|---|---:|---|"]
    for goal in goals:
        if all(name in measured for name in goal.needs):
            value = goal.number(measured)
            met = "" if goal.is_informative else "yes" if goal.is_met(value) else "**no**"
            lines.append(f"| {goal.text} | {value:.2f} | {met} |")
    return "\n".join(lines)


def main() -> None:
    """Make the checkpoints, run everything, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", default=["2B", "8B"])
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    parser.add_argument("--only", nargs="+", metavar="WORD", help="jobs whose names hold one of these words")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="compare with another checkout of qtool, on the 2B shape"
    )
    options = parser.parse_args()
    if options.against:
        options.shapes = ["2B"]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all jobs alike; qtool sets it by itself
    for shape in options.shapes:
        if not (options.folder / shape).exists():
            make_checkpoint(options.folder / shape, shape)
    sizes = ", ".join(f"{shape} {source_bytes(options.folder / shape) / 1e9:.2f} GB" for shape in options.shapes)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {options.rounds} rounds; {sizes}"
    )
    if options.against:
        jobs = against_jobs(options.folder, options.against)
        report(options.folder, "against", measure(options.folder, jobs, options.rounds, list(jobs)), against_goals())
        return
    for suite in options.suites:
        make_jobs, goals = SUITES[suite]
        jobs = make_jobs(options.folder, options.shapes)
        if options.only:
            jobs = {name: command for name, command in jobs.items() if any(word in name for word in options.only)}
        first = next(name for name, command in jobs.items() if "qtool" in command)
        report(options.folder, suite, measure(options.folder, jobs, options.rounds, [first]), goals(options.folder))


def report(folder: Path, suite: str, runs: Mapping[str, Sequence[Measurement]], goals: list[Goal]) -> None:
    """Print the tables of a suite, and keep every measurement in `folder`/SUITE.json."""
    measured = {name: middle(each) for name, each in runs.items()}
    print(f"\n## {suite}\n\n{table(measured)}\n\n{judged(goals, measured)}", flush=True)
    record = {name: [asdict(each) for each in every] for name, every in runs.items()}
    (folder / f"{suite}.json").write_text(json.dumps(record, indent=2))


main()
