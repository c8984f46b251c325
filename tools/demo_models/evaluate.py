"""Measure the demo models on the built-in panels: `python -m tools.demo_models.evaluate [FOLDER]`.

Panels, scorer and metrics are those of `qtool verify`, on a CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import torch

from qtool.arch.spec import Task
from qtool.inputs.builtin import find_panel
from qtool.inputs.panels import Panel, load_panel
from qtool.scoring.scorer import Scorer
from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer
from qtool.verify.collect import Answers, answer, by_query
from qtool.verify.metrics import Scores, ndcg
from tools.demo_models.cards import write_card
from tools.demo_models.checkpoint import model_folder
from tools.demo_models.courses import PREFIXES
from tools.demo_models.panels import PANELS

TASKS = {"reranker": Task.RERANK, "embedder": Task.EMBED}
OPTIONS = ScorerOptions(device="cpu")


def measure(scorer: Scorer, task: Task, panel: Panel) -> dict[str, float]:
    """The nDCG@10 on a panel, that of random orders and of Matryoshka prefixes, and the spread of the scores."""
    whole = answer(panel, scorer, task, scorer.query_instruction)
    low, high = np.percentile(whole.scores, [1, 99])
    return {
        "nDCG@10": _ndcg(panel, whole.scores),
        "of random orders": random_baseline(panel),
        **_of_prefixes(panel, whole),
        "score p1": float(low),
        "score p99": float(high),
    }


def random_baseline(panel: Panel, rounds: int = 50) -> float:
    """The mean nDCG@10 of random orders."""
    random = Random(0)
    orders = (np.array([random.random() for _ in panel.pairs]) for _ in range(rounds))
    return float(np.mean([_ndcg(panel, order) for order in orders]))


def _of_prefixes(panel: Panel, whole: Answers) -> dict[str, float]:
    if whole.vectors is None:
        return {}
    shorter = sorted((length for length in PREFIXES if length < whole.vectors.shape[1]), reverse=True)
    return {f"first {length}": _ndcg(panel, whole.shortened(length).scores) for length in shorter}


def _ndcg(panel: Panel, scores: Scores) -> float:
    labelled = ((query.labels, each) for query, each in zip(panel.queries, by_query(panel, scores), strict=True))
    found = (ndcg(np.array(labels), each) for labels, each in labelled if labels is not None)
    return float(np.mean([value for value in found if value is not None]))


def main() -> None:
    """Measure both models on every panel, print JSON, and write the model cards if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="parent folder of the models (default: the shipped ones)")
    parser.add_argument("--limit", type=int, help="only the first queries of each panel")
    parser.add_argument("--cards", action="store_true", help="write the numbers into the models' README.md")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    panels = [load_panel(find_panel(plan.name)).first(arguments.limit) for plan in PANELS]
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name, task in TASKS.items():
        folder = model_folder(name, arguments.folder)
        scorer = open_scorer(folder, OPTIONS)
        report[name] = {panel.name: measure(scorer, task, panel) for panel in panels}
        if arguments.cards:
            write_card(name, folder, report[name])
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
