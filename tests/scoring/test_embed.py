from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from qtool.arch.spec import Task
from qtool.cli import app
from qtool.errors import QtoolError, UsageError
from qtool.inputs.builtin import find_panel
from qtool.inputs.items import Item
from qtool.inputs.panels import PanelShard, load_panel
from qtool.progress import ignore
from qtool.scoring.embed import EmbedOptions, Texts, _lines, embed
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.score import PanelChoice
from qtool.scoring.scorer import Answered, shortened
from qtool.scoring.transformers.runtime import TransformersScorer
from tests.scoring.servers import serving
from tests.scoring.test_score import killed_while_scoring

CPU = RuntimeOptions(device="cpu")


def options(folder: Path, source: PanelChoice | Texts | None = None) -> EmbedOptions:
    source = source or PanelChoice("demo-text", limit=2)
    return EmbedOptions(target="qtool-demo-embedder", source=source, output=folder / "v.npy", runtime=CPU)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_queries_each_with_its_documents(tmp_path: Path) -> None:
    done = embed(options(tmp_path))
    vectors, rows = np.load(tmp_path / "v.npy"), rows_of(tmp_path / "v.ids.jsonl")
    queries = load_panel(find_panel("demo-text")).first(2).queries
    wanted = [
        each
        for q in queries
        for each in ({"query_id": q.id}, *({"query_id": q.id, "document_id": d.id} for d in q.documents))
    ]
    assert rows == [{"row": place, **each} for place, each in enumerate(wanted)]
    items = [each for query in queries for each in (query.item, *query.documents)]
    # Equal items are embedded once here, beside other mates: measured below 2e-7.
    np.testing.assert_allclose(vectors, open_runtime("qtool-demo-embedder", CPU).embed(items), rtol=0, atol=5e-7)
    np.testing.assert_array_equal(done.vectors, vectors)
    assert vectors.dtype == np.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.ids.jsonl", "v.npy"]


def test_a_dimension_cuts_and_normalises_again(tmp_path: Path) -> None:
    whole = embed(options(tmp_path)).vectors
    cut = embed(replace(options(tmp_path), dim=16, force=True)).vectors
    assert cut.shape == (len(whole), 16)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6)
    for dim in (0, whole.shape[1] + 1):
        with pytest.raises(UsageError, match="dimensions"):
            shortened(whole, dim)


def test_lines_of_text_are_embedded_under_the_instruction(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a red ball\n\n  a blue cube\r\n")
    done = embed(
        replace(options(tmp_path, Texts(tmp_path / "t.txt", instruction="Find it.")), ids=tmp_path / "own.jsonl")
    )
    assert rows_of(tmp_path / "own.jsonl") == [{"row": 0, "line": 1}, {"row": 1, "line": 3}]
    items = [Item("", (text,), instruction="Find it.") for text in ("a red ball", "  a blue cube")]
    np.testing.assert_array_equal(done.vectors, open_runtime("qtool-demo-embedder", CPU).embed(items))


def test_the_mark_that_windows_begins_a_file_with_is_no_text(tmp_path: Path) -> None:
    for name, mark in (("marked", b"\xef\xbb\xbf"), ("plain", b"")):
        (tmp_path / f"{name}.txt").write_bytes(mark + b"a red ball\n")
    marked, plain = (_lines(Texts(tmp_path / f"{name}.txt")) for name in ("marked", "plain"))
    assert marked == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "contains no text"),
        (b"a\n\xff", "line 2: Byte 1 is 0xff, which is not UTF-8"),
        (None, "Cannot read texts .*: No such file"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        embed(options(tmp_path, Texts(tmp_path / "t.txt")))
    assert not (tmp_path / "v.npy").exists()


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = TransformersScorer.embed

    def listened(self: TransformersScorer, items: Sequence[Item], answered: Answered = ignore) -> object:
        asked.append(len(items))
        return real(self, items, answered)

    monkeypatch.setattr(TransformersScorer, "embed", listened)
    command = ["embed", "qtool-demo-embedder", "--panel", "demo-text", "--limit", "12", "-o", str(tmp_path / "v.npy")]
    partial = tmp_path / "v.npy.partial"
    killed_while_scoring(*command, partial=partial, lines=2)
    known = partial.read_bytes().count(b"\n") - 1
    resumed = embed(replace(options(tmp_path, PanelChoice("demo-text", limit=12)), runtime=RuntimeOptions()))
    whole = embed(replace(options(tmp_path, PanelChoice("demo-text", limit=12)), output=tmp_path / "w.npy"))
    assert 0 < asked[0] == asked[1] - known
    # Other batch mates than in one go: measured 6.3e-8.
    np.testing.assert_allclose(resumed.vectors, whole.vectors, rtol=0, atol=5e-7)
    assert not partial.exists()


def test_a_dimension_that_is_too_large_is_refused_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.scoring.transformers.runtime.load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match="Vector has 256 dimensions; --dim asks for 257"):
        embed(replace(options(tmp_path), dim=257))
    assert not list(tmp_path.iterdir())


def test_of_a_server_the_first_vector_tells_that_a_dimension_is_too_large(tmp_path: Path) -> None:
    runtime = RuntimeOptions(task=Task.EMBED, engine="jina", served_model="m", family="qwen3_vl", concurrency=1)
    with serving(lambda _, body: {"data": [{"embedding": [0.6, 0.8]}]} if body else None) as server:
        asked = replace(options(tmp_path), target=server.url, runtime=runtime)
        with pytest.raises(UsageError, match="Vector has 2 dimensions; --dim asks for 3"):
            embed(replace(asked, dim=3))
        before = len(server.bodies("/v1/embeddings"))
        done = embed(replace(asked, dim=2))
    assert before < len(done.rows) / 2
    assert len(server.bodies("/v1/embeddings")) - before < len(done.rows)  # the answers of the first run were kept


def test_a_reranker_is_sent_to_score(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a reranker"):
        embed(replace(options(tmp_path), target="qtool-demo-reranker"))


def test_neither_the_vectors_nor_their_ids_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "v.ids.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"v\.ids\.jsonl already exists"):
        embed(options(tmp_path))


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    out = str(tmp_path / "v.npy")
    command = ["embed", "qtool-demo-embedder", "--panel", "demo-text", "--limit", "2", "--shard", "1/2", "-o", out]
    shown = json.loads(CliRunner().invoke(app, [*command, "--dim", "8", "--json"]).stdout)
    rows = 1 + len(load_panel(find_panel("demo-text")).shard(PanelShard(1, 60)).queries[0].documents)
    assert (shown["rows"], shown["dim"], shown["output"]) == (rows, 8, out)
    for wrong in (["--texts", "t.txt"], []):
        again = [*command[:2], *(command[2:8] if wrong else []), *wrong, "-o", out]
        result = CliRunner().invoke(app, again)
        assert isinstance(result.exception, QtoolError)
