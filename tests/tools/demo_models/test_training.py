"""The shared-cache passes against plain ones, and the training script for a step or two."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qtool.inputs.builtin import find_panel
from qtool.inputs.items import Item
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import load_image, patchify
from qtool.scoring.transformers.runtime import open_scorer
from tools.demo_models import train as training
from tools.demo_models.checkpoint import new_model, read_model, write_model
from tools.demo_models.evaluate import OPTIONS
from tools.demo_models.forward import (
    BETWEEN,
    RERANK_HEAD,
    TAIL,
    Part,
    collate,
    empty_past,
    encode_part,
    last_hidden,
    run_part,
    side_prompt,
)
from tools.demo_models.train import LEGS, Leg


def document_part(tokenizer: Tokenizer, item: Item) -> Part:
    picture = patchify(load_image(item.image[0])) if item.image else None
    return encode_part(tokenizer, side_prompt(item.joined_text, picture) + TAIL, picture)


@pytest.mark.parametrize("name", ["demo-text", "demo-mixed"])
def test_parts_over_a_shared_cache_equal_the_whole_prompt(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_model(new_model(tokenizer, seed=3), tokenizer, "reranker", tmp_path)
    panel = load_panel(find_panel(name)).first(2)
    expected = torch.tensor(open_scorer(tmp_path, OPTIONS).score(panel.pairs))

    asked = collate([encode_part(tokenizer, query.item.joined_text + BETWEEN) for query in panel.queries])
    documents = collate([document_part(tokenizer, pair.document) for pair in panel.pairs])
    model = read_model(tmp_path).eval()
    with torch.no_grad():
        _, past = run_part(model, collate([encode_part(tokenizer, RERANK_HEAD)]), empty_past())
        _, past = run_part(model, asked, past.repeated(len(panel.queries)))
        hidden, _ = run_part(model, documents, past.repeated(len(panel.queries[0].documents)))
        yes, no = model.lm_head.weight[[tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")]]
        got = last_hidden(hidden, documents) @ (yes - no)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("task", ["reranker", "embedder"])
def test_training_runs_and_writes_a_whole_checkpoint(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for course in ("RERANK", "EMBED"):
        monkeypatch.setattr(f"tools.demo_models.courses.{course}_QUERIES", 2)
        monkeypatch.setattr(f"tools.demo_models.courses.{course}_DOCUMENTS", 2)
    training.train(task, tmp_path / "model", (Leg(0, 1, horizon=2), Leg(1, 2, horizon=2)))
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 8_000_000
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert ("LogitScore" in modules[1]["type"]) == (task == "reranker")
    training.train(task, tmp_path / "again", (Leg(0, 1, horizon=2),), tmp_path / "model")


def test_legs_join_and_rates_warm_up_and_fall() -> None:
    for legs in LEGS.values():
        assert legs[0].first == 0
        assert all(one.last == other.first for one, other in pairwise(legs))
        for leg in legs:
            rates = [leg.rate(step) for step in range(leg.first, leg.last)]
            assert max(rates) == pytest.approx(leg.peak)
            assert rates.index(max(rates)) == leg.warmup - 1
            assert rates[-1] < leg.peak
