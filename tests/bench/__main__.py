"""`make bench`: `qtool quantize` on full-size checkpoints, against ModelOpt and against a plain copy.

Everything runs interleaved in one go, each as a whole process; the table is what docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from tests.bench.checkpoints import SHAPES, make_checkpoint
from tests.bench.processes import Measurement, middle, run

GOALS = (
    ("2B: streaming over ModelOpt, at least 15 times faster", lambda m: m["2B modelopt"].seconds / m["2B streaming"].seconds, 15, None),
    ("2B: streaming over cp, at most 2 times its time", lambda m: m["2B streaming"].seconds / m["2B cp"].seconds, None, 2),
    ("2B: streaming, at most 600 MB at its peak", lambda m: m["2B streaming"].peak_rss / 1e6, None, 600),
    ("8B: streaming, at most 600 MB at its peak", lambda m: m["8B streaming"].peak_rss / 1e6, None, 600),
    ("8B over 2B, seconds per byte of checkpoint, at most 1.2", lambda m: per_byte(m, "8B") / per_byte(m, "2B"), None, 1.2),
)  # fmt: skip

SOURCE_BYTES: dict[str, int] = {}


def per_byte(measured: dict[str, Measurement], shape: str) -> float:
    """Streaming's seconds per byte of source."""
    return measured[f"{shape} streaming"].seconds / SOURCE_BYTES[shape]


def jobs(folder: Path, shapes: list[str]) -> dict[str, list[str]]:
    """What is run, by name; each writes `folder`/out."""
    qtool = [sys.executable, "-m", "qtool", "quantize"]
    commands = {}
    for shape in shapes:
        source, out = str(folder / shape), str(folder / "out")
        commands[f"{shape} cp"] = ["cp", "-r", source, out]
        commands[f"{shape} streaming"] = [*qtool, source, "-o", out, "--backend", "streaming"]
        if shape == "2B":
            commands[f"{shape} modelopt"] = [*qtool, source, "-o", out, "--backend", "modelopt"]
    return commands


def measure(folder: Path, shapes: list[str], rounds: int) -> dict[str, list[Measurement]]:
    """All jobs, round by round; an unmeasured run first compiles the kernels into numba's cache."""
    commands = jobs(folder, shapes)
    run(commands["2B streaming"], folder / "log")
    shutil.rmtree(folder / "out")
    runs: dict[str, list[Measurement]] = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            runs[name].append(run(command, folder / "log"))
            shutil.rmtree(folder / "out")
            print(f"round {number}  {name:14}  {runs[name][-1].seconds:8.2f} s", file=sys.stderr)
    return runs


def table(measured: dict[str, Measurement]) -> str:
    """The medians as a Markdown table."""
    lines = ["| run | seconds | CPU seconds | peak RSS |", "|---|---:|---:|---:|"]
    for name, m in measured.items():
        lines.append(f"| {name} | {m.seconds:.1f} | {m.cpu_seconds:.1f} | {m.peak_rss / 1e6:,.0f} MB |")
    return "\n".join(lines)


def goals(measured: dict[str, Measurement]) -> str:
    """Each goal with its number and whether it was met."""
    lines = ["| goal | measured | met |", "|---|---:|---|"]
    for text, number, least, most in GOALS:
        if all(f"{shape} streaming" in measured for shape in SHAPES if shape in text):
            value = number(measured)
            met = (least is None or value >= least) and (most is None or value <= most)
            lines.append(f"| {text} | {value:.2f} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)


def main() -> None:
    """Make the checkpoints, run everything, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["2B", "8B"])
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    for shape in options.shapes:
        if not (options.folder / shape).exists():
            make_checkpoint(options.folder / shape, shape)
        SOURCE_BYTES[shape] = sum(path.stat().st_size for path in (options.folder / shape).iterdir())
    runs = measure(options.folder, options.shapes, options.rounds)
    measured = {name: middle(each) for name, each in runs.items()}
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {options.rounds} rounds"
    )
    sizes = ", ".join(f"{shape} {size / 1e9:.2f} GB" for shape, size in SOURCE_BYTES.items())
    print(f"{machine}; {sizes}\n\n{table(measured)}\n\n{goals(measured)}")
    record = {name: [asdict(each) for each in every] for name, every in runs.items()}
    (options.folder / "result.json").write_text(json.dumps(record, indent=2))


main()
