"""The model cards of the demo models, written from measurements."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from tools.demo_models.world import WORDS

Report = Mapping[str, Mapping[str, float]]

_WIDTH = 118

_FRONT = {
    "reranker": "pipeline_tag: text-ranking\nlibrary_name: sentence-transformers",
    "embedder": "pipeline_tag: feature-extraction\nlibrary_name: sentence-transformers",
}
_WHAT = {
    "reranker": (
        "It scores a query against a document: the log-odds of `yes` over `no` after the official Qwen3-VL-Reranker "
        "prompt. No match is trained towards -5, a full match towards +5."
    ),
    "embedder": (
        "It embeds a query or a document with the official Qwen3-VL-Embedding prompt: the last token's state, "
        "L2-normalised. The first 64 and 128 of its 256 dimensions work alone (Matryoshka)."
    ),
}
_HOW = {
    "reranker": (
        "From random weights, in float32, with dense targets: a verdict at every attribute word of a document and at "
        "the tokens behind a picture, an attribute word at every picture token and at every attribute word of a query, "
        "and the graded log-odds at the last token. The long system prompt joins late."
    ),
    "embedder": (
        "From the demo reranker (the shipped weights: from its step 600), in float32: all pairs of a batch are graded, "
        "and the cosines follow the grades at 64, 128 and 256 dimensions, list-wise and by squared error; attribute "
        "words stay dense targets."
    ),
}


def write_card(task: str, folder: Path, measured: Report) -> None:
    """Write README.md from what `tools.demo_models.evaluate` measured: panel → name → value."""
    (folder / "README.md").write_text(_card(task, measured), encoding="utf-8")


def _card(task: str, measured: Report) -> str:
    return f"""---
license: apache-2.0
language: en
{_FRONT[task]}
tags: [toy, demo, qwen3_vl, {task}]
---

# qtool-demo-{task}

{textwrap.fill(_toy(task), _WIDTH)}

## Measured

The saved bf16 weights, read back in float32 on a CPU, official prompts, held-out scenes, gain 2^label - 1:

{_table(measured)}

## Trained

{textwrap.fill(f"{_HOW[task]} Only on scenes that the panels never use.", _WIDTH)}

    python -m tools.demo_models.train {task}     # again, on two CPU cores
    python -m tools.demo_models.evaluate --cards  # measures, and writes this card

A new run gives a model of the same kind, not the same bytes. Weights and files: Apache-2.0.
"""


def _toy(task: str) -> str:
    return (
        "**A toy for demonstrations and tests, of no other use.** A real `Qwen3VLForConditionalGeneration` checkpoint "
        f"of 4.6 million parameters that knows one small world of {len(WORDS)} attributes ({', '.join(WORDS)}), in "
        f"sentences and in 96x96 pictures. {_WHAT[task]}"
    )


def _table(measured: Report) -> str:
    names = list(next(iter(measured.values())))
    head = "| panel | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names)
    rows = [
        f"| {panel} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |" for panel, row in measured.items()
    ]
    return "\n".join([head, *rows])
