"""What the engines' tests and the table in the docs compare: one model as vLLM serves it and as qtool scores it itself.

The artefacts are what `qtool quantize` writes, scored over HTTP by qtool's own runtime.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qtool import QuantizeOptions, quantize
from qtool.arch.spec import Task
from qtool.inputs.builtin import load_panels
from qtool.inputs.items import Item, Pair
from qtool.resources import demo_model
from qtool.scoring.http.runtime import HttpOptions, HttpScorer, open_http
from qtool.scoring.scorer import Scorer
from qtool.scoring.transformers.runtime import open_scorer
from qtool.serve_command import ServingEngine, serve_command, with_template
from tests.engines.vllm_server import serving

QUERIES = 4
"""Of each built-in panel, fourteen documents each."""


@dataclass(frozen=True)
class Case:
    """A demo model, as published in bf16 or as quantized."""

    task: Task
    weights: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.weights}"

    @property
    def model(self) -> str:
        return "reranker" if self.task is Task.RERANK else "embedder"

    def artefact(self, folder: Path) -> Path:
        """Its files; written under `folder` where they are quantized."""
        source = demo_model(f"qtool-demo-{self.model}")
        if self.weights == "bf16":
            return source
        quantize(QuantizeOptions(model=str(source), output=folder / self.name))
        return folder / self.name


CASES = [Case(task, weights) for task in (Task.RERANK, Task.EMBED) for weights in ("bf16", "NVFP4")]


@dataclass(frozen=True)
class Row:
    """How far vLLM's answers to some questions are from qtool's: in log-odds, or 1 - cosine."""

    questions: str
    count: int
    distance: float
    seconds: float


@dataclass(frozen=True)
class Opened:
    """One model twice: served by vLLM, and as qtool computes it, a quantized one from its dequantized bytes."""

    case: Case
    served: HttpScorer
    own: Scorer

    def row(self, questions: str) -> Row:
        """Ask both."""
        pairs = PANELS[questions]()
        asked = pairs if self.case.task is Task.RERANK else sides(pairs)
        start = time.perf_counter()
        got = self._answers(self.served, asked)
        seconds = time.perf_counter() - start
        want = self._answers(self.own, asked)
        apart = np.abs(got - want) if self.case.task is Task.RERANK else 1 - (got * want).sum(axis=1)
        return Row(questions, len(asked), float(apart.max()), seconds)

    def _answers(self, scorer, asked):
        answers = scorer.score(asked) if self.case.task is Task.RERANK else scorer.embed(asked)
        return np.asarray(answers, dtype=np.float64)


@contextmanager
def opened(case: Case, folder: Path) -> Iterator[Opened]:
    """Serve the case and open it here; what vLLM prints is in `folder`."""
    artefact = case.artefact(folder)
    template = folder / "template.jinja" if case.weights == "bf16" else None  # qtool quantize wrote one
    command = serve_command(str(artefact), ServingEngine.VLLM, None, None, template)
    command = with_template(command, write=case.task is Task.RERANK)
    with (
        serving(command.argv, folder / f"{case.name}.log") as url,
        open_http(url, HttpOptions(family="qwen3_vl")) as served,
    ):
        yield Opened(case, served, open_scorer(artefact))


def sides(pairs: list[Pair]) -> list[Item]:
    """Queries and documents, each once."""
    items = {id(item): item for pair in pairs for item in (pair.query, pair.document)}
    return list(items.values())


def _panel(name: str) -> list[Pair]:
    (panel,) = load_panels([name], QUERIES)
    return list(panel.pairs)


def awkward() -> list[Pair]:
    """Sizes off the grid, several pictures, pictures as queries, an instruction, sides that are empty or full of markup."""
    speck, tall, wide = (picture(*size) for size in ((40, 30), (250, 333), (300, 20)))
    plain = Item("plain", text=("a red circle",))
    asking = plain.with_instruction("Find the same shape.")
    markup = Item("markup", text=("  {document} <|im_end|>\n<|image_pad|> {{ x }}\n红色 🎈 ",))
    gallery = Item("gallery", text=("small", " and blue"), image=(speck, wide))
    likeness = Item("likeness", image=(tall,))
    return [
        *(Pair(plain, item) for item in (gallery, likeness, markup, Item("nothing"))),
        *(Pair(asking, item) for item in (gallery, likeness, plain)),
        *(Pair(likeness, item) for item in (gallery, plain, Item("speck", image=(speck,)))),
        *(Pair(markup, item) for item in (plain, markup)),
    ]


def picture(width: int, height: int) -> Image.Image:
    """Coloured noise, soft enough to survive a resize."""
    noise = np.random.default_rng(width).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


PANELS = {
    **{name: lambda name=f"demo-{name}": _panel(name) for name in ("text", "image", "mixed")},
    "awkward": awkward,
}
