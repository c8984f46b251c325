"""The demo models, through the forward pass that scores them: log-odds of a reranker, vectors of an embedder.

Calibrated on new pairs of training scenes, evaluated on the shipped panels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from qtool.calibration.gradients import signed
from qtool.inputs.builtin import find_panel
from qtool.inputs.panels import Panel, load_panel
from qtool.resources import demo_model
from qtool.scoring.prompt import Prompt
from qtool.scoring.transformers.prefix import Continuation, Forward, KvPrefix, PromptSpan
from qtool.scoring.transformers.runtime import ScorerOptions, TransformersScorer, open_scorer
from tests.bench_quality.beds import Batch, Bed, numbered
from tests.bench_quality.smollm2 import GROUPS, permute_decoder
from tools.demo_models.panels import PanelPlan, panel_text

PANELS = {"text": "demo-text", "image": "demo-image", "mixed": "demo-mixed"}


def demo(kind: str, pairs: int, seed: int, queries: int = 12) -> Bed:
    """The bed of "reranker" or "embedder"; `queries` of each panel are evaluated."""
    scorer = open_scorer(demo_model(f"qtool-demo-{kind}"), ScorerOptions(device="cpu"))
    forward, answer = scorer.loaded.reader.forward, scorer.loaded.answer
    model, back = forward.base, slice(None)
    if seed:
        back = torch.argsort(_permute(model, seed))
    seen: dict[tuple[int, ...], int] = {}

    def batches(panel: Panel) -> list[Batch]:
        return [_batch(forward.span(prompt), seen) for prompt in _prompts(scorer, panel)]

    def run(base: Any, batch: Batch) -> torch.Tensor:
        return _run(replace(forward, base=base), batch)

    def answers_of(base: Any, batch: Batch) -> torch.Tensor:
        return answer(run(base, batch)[:, -1].float()[..., back])

    @torch.no_grad()
    def answers(base: Any, given: Sequence[Batch]) -> dict[str, np.ndarray]:
        values = torch.cat([answers_of(base, batch) for batch in given]).numpy()
        return {"vector": values} if kind == "embedder" else {"odds": values[:, None]}

    def probe(base: Any, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return signed(answers_of(base, batch), generator)

    plan = PanelPlan(
        "bench-calibration", "mixed", 9_000 + seed, max(1, pairs // 2), 2, ("text", "picture", "both"), held_out=False
    )
    calibration = batches(_panel(plan))
    evaluations = {name: batches(load_panel(find_panel(panel)).first(queries)) for name, panel in PANELS.items()}
    return Bed(
        f"demo {kind}",
        model,
        lambda each: each.language_model.layers,
        GROUPS,
        run,
        answers,
        calibration,
        evaluations,
        rides=True,
        probe=probe,
    )


def _panel(plan: PanelPlan) -> Panel:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{plan.name}.jsonl"
        path.write_text(panel_text(plan), encoding="utf-8")
        return load_panel(path)


def _prompts(scorer: TransformersScorer, panel: Panel) -> Iterator[Prompt]:
    builder = scorer._builder
    if scorer.task.value == "rerank":
        yield from (builder.pair(pair) for pair in panel.pairs)
        return
    for query in panel.queries:
        yield builder.item(query.item)
        yield from (builder.item(document.item) for document in query.documents)


def _batch(span: PromptSpan, seen: dict[tuple[int, ...], int]) -> Batch:
    """One prompt; its pictures' tokens are told apart by the pictures' bytes, so that only equal beginnings are shared."""
    ids = span.ids.copy()
    digest = hashlib.sha256(b"".join(picture.pixel_values.tobytes() for picture in span.pictures)).digest()
    ids[span.is_picture] = -int.from_bytes(digest[:6], "big") - np.arange(np.count_nonzero(span.is_picture))
    return Batch({"span": span}, *numbered([ids.tolist()], seen))


def _run(forward: Forward, batch: Batch) -> torch.Tensor:
    spans = [batch.inputs["span"]]
    cache = Continuation(KvPrefix.empty(forward.device), torch.tensor([0]), keep=False)
    return forward._run(spans, forward._is_token(spans), cache)


@torch.no_grad()
def _permute(model: Any, seed: int) -> torch.Tensor:
    """The function-identical twin: the decoder's dimensions, and with them the rows of what pictures are merged to."""
    hidden = permute_decoder(model.language_model, model.language_model.config, torch.Generator().manual_seed(seed))
    for merger in (model.visual.merger, *model.visual.deepstack_merger_list):
        merger.linear_fc2.weight.copy_(merger.linear_fc2.weight[hidden])
        merger.linear_fc2.bias.copy_(merger.linear_fc2.bias[hidden])
    return hidden
