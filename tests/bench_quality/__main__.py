"""`make bench-quality`: what each recipe costs in answers, on real models, against `max` and the peers.

Results are kept in bench-out/quality.jsonl as they come, and what is there is not measured again; `--page` writes
docs/quality.md from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from qtool.calibration.moments import single_threaded_blas
from qtool.workers import worker_pool
from tests.bench_quality.beds import Bed
from tests.bench_quality.measures import drifts, floor
from tests.bench_quality.pipeline import quantize
from tests.bench_quality.recipes import RECIPES

Row = dict[str, Any]
KEY = ("bed", "samples", "seed", "recipe")


def beds() -> dict[str, Callable[[int, int, int], Bed]]:
    """By name what makes a bed from the number of calibration samples, a seed, and how much is evaluated."""
    from tests.bench_quality.demo import demo
    from tests.bench_quality.minilm import minilm
    from tests.bench_quality.smollm2 import smollm2

    return {
        "demo-reranker": lambda samples, seed, evaluated: demo("reranker", samples, seed, max(1, evaluated // 14)),
        "demo-embedder": lambda samples, seed, evaluated: demo("embedder", samples, seed, max(1, evaluated // 14)),
        "minilm": minilm,
        "smollm2": smollm2,
    }


def measure(name: str, samples: int, seed: int, evaluated: int, wanted: list[str], pool: Executor) -> Iterator[Row]:
    """A row a recipe, "bf16" first; the bed is made once."""
    bed = beds()[name](samples, seed, evaluated)
    about = {"bed": name, "samples": samples, "seed": seed}
    references = {key: bed.answers(bed.model, given) for key, given in bed.evaluations.items()}
    if "bf16" in wanted:
        yield {**about, "recipe": "bf16", "drifts": {key: floor(bed, key, references[key]) for key in bed.evaluations}}
    for recipe in (RECIPES[each] for each in wanted if each != "bf16"):
        started = time.process_time()
        model, report = quantize(bed, recipe, pool)
        seconds = time.process_time() - started
        found = {key: drifts(bed.answers(model, given), references[key]) for key, given in bed.evaluations.items()}
        row = {**about, "recipe": recipe.name, "drifts": found, "tokens": report.tokens, "cpu_seconds": seconds}
        if report.gains:
            row["predicted"] = {"gain": rms(report.gains), "centred": rms(report.centred)}
        yield row


def rms(values: list[float]) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def main() -> None:
    """Measure what is not measured yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beds", nargs="+", default=list(beds()), choices=list(beds()))
    parser.add_argument("--samples", type=int, default=256, help="calibration pairs or sentences")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="0 is the model itself, others are twins"
    )
    parser.add_argument("--evaluated", type=int, default=200, help="pairs or sentences of each evaluation")
    parser.add_argument("--recipes", nargs="+", default=["bf16", *RECIPES], choices=["bf16", *RECIPES])
    parser.add_argument("--results", type=Path, default=Path("bench-out/quality.jsonl"))
    parser.add_argument("--page", type=Path, help="write the page of the results here, and measure nothing")
    options = parser.parse_args()
    if options.page:
        from tests.bench_quality.page import page

        options.page.write_text(page(read(options.results)), encoding="utf-8")
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with worker_pool() as pool, single_threaded_blas():
        for name in options.beds:
            for seed in options.seeds:
                done = {tuple(row[key] for key in KEY) for row in read(options.results)}
                wanted = [each for each in options.recipes if (name, options.samples, seed, each) not in done]
                if not wanted:
                    continue
                for row in measure(name, options.samples, seed, options.evaluated, wanted, pool):
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, "evaluated": options.evaluated}) + "\n")
                    print(name, seed, row["recipe"], brief(row), file=sys.stderr, flush=True)


def read(path: Path) -> list[Row]:
    """The rows measured so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def brief(row: Row) -> str:
    """The drifts in one line."""
    parts = [
        f"{key} {measure} {each['raw']:.4f}/{each['centred']:.4f}"
        for key, found in row["drifts"].items()
        for measure, each in found.items()
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
