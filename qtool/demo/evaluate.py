"""Measure the shipped models on the shipped panels: `python -m qtool.demo.evaluate [FOLDER]`.

The one rule: the honest path: the saved bf16 weights, read back in float32, whole official prompts,
left padding, no shared cache.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from qtool.demo.architecture import HIDDEN
from qtool.demo.cards import write_card
from qtool.demo.encoding import Part, encode_part, side_of
from qtool.demo.export import MODELS, read_model
from qtool.demo.panels import CALIBRATION, PANELS
from qtool.demo.prompts import embed_prompt, rerank_prompt
from qtool.inputs.vision import PatchedImage, load_image, patchify

CUTOFF = 10
BATCH = 28


@dataclass(frozen=True)
class Query:
    """One panel line, pictures patched."""

    query: tuple[str, PatchedImage | None]
    documents: list[tuple[str, PatchedImage | None]]
    labels: list[int]


def read_panel(path: Path, limit: int | None = None) -> list[Query]:
    """Read the first `limit` queries of a panel; its hash is the business of `qtool.inputs`."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [_query(json.loads(line)) for line in lines[:limit]]


def _query(line: dict[str, Any]) -> Query:
    labels = [int(document["label"]) for document in line["documents"]]
    return Query(_item(line["query"]), [_item(document) for document in line["documents"]], labels)


def _item(side: dict[str, Any]) -> tuple[str, PatchedImage | None]:
    picture = patchify(load_image(side["image"])) if "image" in side else None
    return side.get("text", ""), picture


def ndcg(scores: Sequence[float], labels: Sequence[int], cutoff: int = CUTOFF) -> float:
    """Compute nDCG with gain 2^label - 1 and logarithmic discount."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return _dcg([labels[index] for index in order], cutoff) / _dcg(sorted(labels, reverse=True), cutoff)


def _dcg(labels: Sequence[int], cutoff: int) -> float:
    return sum(float(2**label - 1) / math.log2(rank + 2) for rank, label in enumerate(labels[:cutoff]))


class Model:
    """A checkpoint folder, read back in float32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model = read_model(folder).eval()

    def log_odds(self, query: Query) -> list[float]:
        """Return the reranker's score of every document."""
        text, picture = query.query
        prompts = [
            (rerank_prompt(side_of(text, picture), side_of(*document)), document[1]) for document in query.documents
        ]
        ids = [self.tokenizer.token_to_id(word) for word in ("yes", "no")]
        yes, no = self._model.lm_head.weight.detach()[ids]
        return list((self._hidden(prompts) @ (yes - no)).tolist())

    def cosines(self, query: Query, dimensions: Sequence[int] = (HIDDEN,)) -> list[list[float]]:
        """Return the embedder's cosine with every document, for each Matryoshka length."""
        items = [query.query, *query.documents]
        hidden = self._hidden([(embed_prompt(side_of(*item)), item[1]) for item in items])
        cut = [torch.nn.functional.normalize(hidden[:, :length], dim=-1) for length in dimensions]
        return [list((vectors[1:] @ vectors[0]).tolist()) for vectors in cut]

    @torch.no_grad()
    def _hidden(self, prompts: list[tuple[str, PatchedImage | None]]) -> torch.Tensor:
        parts = [encode_part(self.tokenizer, text, picture) for text, picture in prompts]
        groups = [parts[start : start + BATCH] for start in range(0, len(parts), BATCH)]
        return torch.cat([self._last(group) for group in groups])

    def _last(self, parts: list[Part]) -> torch.Tensor:
        """Left-pad, let transformers work out the M-RoPE positions, take the last column."""
        longest = max(len(part.ids) for part in parts)
        ids = torch.tensor([[0] * (longest - len(part.ids)) + part.ids for part in parts])
        mask = torch.tensor([[0] * (longest - len(part.ids)) + [1] * len(part.ids) for part in parts])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        pictures = [part.picture for part in parts if part.picture is not None]
        if pictures:
            inputs["mm_token_type_ids"] = (ids == self._model.config.image_token_id).int()
            inputs["pixel_values"] = torch.from_numpy(np.concatenate([p.pixel_values for p in pictures]))
            inputs["image_grid_thw"] = torch.tensor([p.grid_thw for p in pictures])
        hidden: torch.Tensor = self._model.model(**inputs).last_hidden_state
        return hidden[:, -1]


def random_baseline(queries: list[Query], rounds: int = 50) -> float:
    """Return the mean nDCG of random orders."""
    random = Random(0)  # noqa: S311  not for secrets
    return _mean([ndcg([random.random() for _ in query.labels], query.labels) for query in queries * rounds])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure(task: str, folder: Path, queries: list[Query]) -> dict[str, float]:
    """Measure nDCG@10 on a panel, beside random orders, and the spread of the scores."""
    model = Model(folder)
    lengths = (HIDDEN, 128, 64) if task == "embedder" else ()
    if lengths:
        scores, *cut = zip(*[model.cosines(query, lengths) for query in queries], strict=True)
    else:
        scores, cut = tuple(model.log_odds(query) for query in queries), []
    result = {"nDCG@10": _mean_ndcg(scores, queries), "of random orders": random_baseline(queries)}
    result |= {f"first {length}": _mean_ndcg(rows, queries) for length, rows in zip(lengths[1:], cut, strict=True)}
    low, high = np.percentile([score for row in scores for score in row], [1, 99])
    return {**result, "score p1": float(low), "score p99": float(high)}


def _mean_ndcg(scores: Sequence[list[float]], queries: list[Query]) -> float:
    return _mean([ndcg(row, query.labels) for row, query in zip(scores, queries, strict=True)])


def main() -> None:
    """Measure both models on every panel, print JSON, and write the model cards if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=MODELS, help="parent folder of the models")
    parser.add_argument("--limit", type=int, help="only the first queries of each panel")
    parser.add_argument("--cards", action="store_true", help="write the numbers into the models' README.md")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    panels = {p.name: read_panel(CALIBRATION / "panels" / f"{p.name}.jsonl", arguments.limit) for p in PANELS}
    report: dict[str, dict[str, dict[str, float]]] = {}
    for task in ("reranker", "embedder"):
        folder = arguments.folder / f"qtool-demo-{task}"
        report[task] = {name: measure(task, folder, queries) for name, queries in panels.items()}
        if arguments.cards:
            write_card(task, folder, report[task])
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
