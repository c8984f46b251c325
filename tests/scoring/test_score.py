from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from qtool.cli import app
from qtool.errors import UsageError
from qtool.inputs.builtin import find_panel
from qtool.inputs.items import Pair
from qtool.inputs.panels import PanelShard, load_panel
from qtool.progress import ignore
from qtool.scoring.ledger import open_ledger
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.score import PanelChoice, ScoreOptions, score
from qtool.scoring.scorer import Answered, sigmoid
from qtool.scoring.transformers.runtime import TransformersScorer

CPU = RuntimeOptions(device="cpu")
SMALL = ScoreOptions(target="qtool-demo-reranker", panel=PanelChoice("demo-text", limit=2), runtime=CPU)
PAIRS = load_panel(find_panel("demo-text")).first(2).pairs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine was asked, by name."""
    names: list[str] = []
    real = TransformersScorer.score

    def listened(self: TransformersScorer, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        names.extend(pair.name for pair in pairs)
        return real(self, pairs, answered)

    monkeypatch.setattr(TransformersScorer, "score", listened)
    return names


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_pair_is_scored_in_the_panels_order() -> None:
    expected = open_runtime("qtool-demo-reranker", CPU).score(PAIRS)
    scores = score(SMALL)
    assert [(each.query_id, each.document_id) for each in scores.pairs] == [(p.query.id, p.document.id) for p in PAIRS]
    assert [each.log_odds for each in scores.pairs] == expected
    np.testing.assert_allclose([each.probability for each in scores.pairs], 1 / (1 + np.exp(-np.array(expected))))


def test_shards_together_are_the_whole() -> None:
    whole = {(each.query_id, each.document_id): each.log_odds for each in score(SMALL).pairs}
    parts = [
        score(replace(SMALL, panel=PanelChoice("demo-text", limit=2, shard=PanelShard(index, 2)))) for index in (1, 2)
    ]
    found = {(each.query_id, each.document_id): each.log_odds for part in parts for each in part.pairs}
    assert found.keys() == whole.keys()
    # Other batch mates than in one go: measured 9.5e-7.
    np.testing.assert_allclose([found[key] for key in whole], list(whole.values()), rtol=0, atol=5e-6)


def test_an_instruction_replaces_the_queries_own() -> None:
    instructed = score(replace(SMALL, panel=PanelChoice("demo-text", limit=1, instruction="Retrieve nothing.")))
    pairs = [replace(pair, query=pair.query.with_instruction("Retrieve nothing.")) for pair in PAIRS[:14]]
    assert [each.log_odds for each in instructed.pairs] == open_runtime("qtool-demo-reranker", CPU).score(pairs)
    assert [each.log_odds for each in instructed.pairs] != [each.log_odds for each in score(SMALL).pairs[:14]]


def killed_while_scoring(*arguments: str, partial: Path, lines: int) -> None:
    """Run qtool in a process of its own and kill it once `partial` has that many lines."""
    process = subprocess.Popen([sys.executable, "-m", "qtool", *arguments])
    until = time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= lines) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make the panel larger"


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path, asked: list[str]) -> None:
    output, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    arguments = ["score", "qtool-demo-reranker", "--panel", "demo-text", "--limit", "10"]
    killed_while_scoring(*arguments, "-o", str(output), partial=partial, lines=2)
    assert not output.exists()
    known = partial.read_bytes().count(b"\n") - 1
    options = ScoreOptions(target="qtool-demo-reranker", panel=PanelChoice("demo-text", limit=10), output=output)
    whole = score(replace(options, output=None))
    asked.clear()
    resumed = score(options)
    assert 0 < len(asked) == len(whole.pairs) - known
    assert list(tmp_path.iterdir()) == [output]
    assert [pair["document_id"] for pair in lines_of(output)] == [pair.document_id for pair in whole.pairs]
    assert [pair["log_odds"] for pair in lines_of(output)] == [pair.log_odds for pair in resumed.pairs]
    # Other batch mates than in one go: measured 1.7e-6.
    np.testing.assert_allclose(
        [pair.log_odds for pair in resumed.pairs], [pair.log_odds for pair in whole.pairs], rtol=0, atol=1e-5
    )


def test_what_was_answered_for_another_model_is_refused_and_force_begins_anew(tmp_path: Path, asked: list[str]) -> None:
    output, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    identity = open_runtime("qtool-demo-reranker", RuntimeOptions(dtype="bfloat16", device="cpu")).identity
    open_ledger(partial, identity).close()
    options = replace(SMALL, output=output)
    with pytest.raises(UsageError, match="numbers is 'bfloat16 on cpu', expected 'float32 on cpu'"):
        score(options)
    score(replace(options, force=True))
    assert len(asked) == len(PAIRS) == len(lines_of(output))


def test_an_existing_file_is_refused_before_anything_is_loaded(tmp_path: Path, asked: list[str]) -> None:
    output = tmp_path / "s.jsonl"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        score(replace(SMALL, output=output))
    with pytest.raises(UsageError, match="is a folder"):
        score(replace(SMALL, output=tmp_path, force=True))
    with pytest.raises(UsageError, match="was not made by qtool"):
        score(replace(SMALL, output=output, force=True))
    assert output.read_text() == "mine"
    assert asked == []


def test_a_panel_is_not_replaced_by_its_scores(tmp_path: Path) -> None:
    panel = tmp_path / "p.jsonl"
    panel.write_text('{"query": "a", "documents": ["b"]}\n')
    choice = PanelChoice(str(panel))
    with pytest.raises(UsageError, match="was not made by qtool"):
        score(replace(SMALL, panel=choice, output=panel, force=True))
    output = tmp_path / "s.jsonl"
    for _ in range(2):
        score(replace(SMALL, panel=choice, output=output, force=True))
    assert len(lines_of(output)) == 1


def test_an_embedder_is_sent_to_embed() -> None:
    with pytest.raises(UsageError, match="is an embedder") as caught:
        score(replace(SMALL, target="qtool-demo-embedder"))
    assert caught.value.hint == "Use qtool embed."


@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 40.0, -40.0, 700.0, -700.0])
def test_a_probability_is_the_sigmoid_however_far_out(value: float) -> None:
    assert sigmoid(value) == pytest.approx(1 / (1 + math.exp(-value)), rel=1e-12)


def test_the_command_prints_lines_or_one_object() -> None:
    command = ["score", "qtool-demo-reranker", "--panel", "demo-text", "--limit", "2", "--shard", "2/2"]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0
    lines = [json.loads(line) for line in printed.stdout.splitlines()]
    assert list(lines[0]) == ["query_id", "document_id", "log_odds", "probability"]
    assert {line["query_id"] for line in lines} == {PAIRS[-1].query.id}
    whole = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert whole["schema_version"] == 1
    assert whole["pairs"] == lines
