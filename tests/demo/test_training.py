"""The shared-cache passes against plain ones, and the training script for a step or two."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qtool.demo import train as training
from qtool.demo.architecture import new_model
from qtool.demo.encoding import collate, encode_part
from qtool.demo.evaluate import Model, read_panel
from qtool.demo.export import write_model
from qtool.demo.forward import empty_past, last_hidden, run_part
from qtool.demo.panels import CALIBRATION
from qtool.demo.prompts import BETWEEN, RERANK_HEAD, TAIL, Side
from qtool.demo.train import LEGS, Leg


@pytest.mark.parametrize("panel", ["demo-text", "demo-mixed"])
def test_parts_over_a_shared_cache_equal_the_whole_prompt(panel: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = new_model(tokenizer, seed=3)
    write_model(model, tokenizer, "reranker", tmp_path)
    scorer = Model(tmp_path)
    queries = read_panel(CALIBRATION / "panels" / f"{panel}.jsonl", 2)
    expected = torch.tensor([scorer.log_odds(query) for query in queries]).flatten()

    asked = collate([encode_part(tokenizer, query.query[0] + BETWEEN) for query in queries])
    documents = collate(
        [
            encode_part(tokenizer, Side(text, picture.placeholder_tokens if picture else 0).prompt + TAIL, picture)
            for query in queries
            for text, picture in query.documents
        ]
    )
    model = scorer._model
    with torch.no_grad():
        _, past = run_part(model, collate([encode_part(tokenizer, RERANK_HEAD)]), empty_past())
        _, past = run_part(model, asked, past.repeated(len(queries)))
        hidden, _ = run_part(model, documents, past.repeated(len(queries[0].documents)))
        yes, no = model.lm_head.weight[[tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")]]
        got = last_hidden(hidden, documents) @ (yes - no)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("task", ["reranker", "embedder"])
def test_training_runs_and_writes_a_whole_checkpoint(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reranker", "embedder"):
        monkeypatch.setattr(f"qtool.demo.{module}.QUERIES", 2)
        monkeypatch.setattr(f"qtool.demo.{module}.DOCUMENTS", 2)
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
