"""The report for programs and for people, and what `inspect` may be asked."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from qtool.arch.prompts import VL_RERANKER
from qtool.checks.inspect import inspect
from qtool.errors import ModelError, UsageError
from qtool.storage.gguf import string
from qtool.storage.gguf_model import RERANK_KEY
from tests.checks.rewriting import rewrite_gguf


def rendered(report, width=100):
    console = Console(width=width, record=True, color_system=None)
    console.print(report)
    return console.export_text()


@pytest.fixture
def broken(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", lambda values: values.pop(RERANK_KEY))
    return folder


def test_the_json_has_a_schema_and_all_that_was_found(broken):
    report = json.loads(json.dumps(inspect(str(broken)).to_dict()))
    assert list(report) == ["schema_version", "target", "revision", "fetched_bytes", "broken", "undecided", "artefacts"]
    assert (report["schema_version"], report["broken"], report["revision"], report["fetched_bytes"]) == (
        1,
        True,
        None,
        0,
    )
    language, projector = report["artefacts"]
    assert list(language) == [
        "name", "kind", "family", "architecture", "task", "task_source", "format", "weights", "bytes",
        "bits_per_weight", "classes", "markers", "findings",
    ]  # fmt: skip
    assert language["findings"] == [
        {
            "code": "gguf-no-rerank-template",
            "severity": "broken",
            "sentence": "The rerank template is missing: llama.cpp joins query and document in a way that the model was not trained on.",
            "remedy": f"qtool repair-gguf {broken / 'model.gguf'} -o FIXED.gguf --task rerank",
        }
    ]
    assert list(language["classes"][0]) == ["name", "tensors", "types", "weights", "bytes", "bits_per_weight"]
    assert language["markers"]["rerank template"] == "missing"
    assert language["task_source"] == "cls.output.weight"
    assert projector["kind"] == "gguf projector"


def test_a_person_reads_what_it_is_and_what_mends_it(broken):
    text = rendered(inspect(str(broken)), width=200)
    assert "gguf: Qwen3-VL, qwen3vl, task rerank (cls.output.weight)" in text
    assert "broken gguf-no-rerank-template: The rerank template is missing" in text
    assert "qtool repair-gguf" in text
    assert text.rstrip().endswith("BROKEN: 1 broken.")


def test_a_healthy_artefact_is_said_to_be_so(made):
    assert rendered(inspect(str(made("reranker")))).rstrip().endswith("OK: no problems found.")


def test_what_nothing_tells_the_task_of_is_not_said_to_be_ok(copy_of):
    folder = copy_of("text-embedder-gguf")
    rewrite_gguf(folder / "model.gguf", lambda values: values.pop("qwen3.pooling_type"))
    (last,) = rendered(inspect(str(folder)), width=200).rstrip().splitlines()[-1:]
    assert last.startswith("UNDECIDED, with 1 warning: the task is not declared")
    assert "--task rerank" in last


def test_a_stranger_cannot_drive_the_terminal(copy_of):
    folder = copy_of("reranker-gguf")
    evil = "[red]\x1b[2J\n\udc80" + "x" * 500
    template = VL_RERANKER.template.replace("{instruction}", evil)
    rewrite_gguf(folder / "model.gguf", lambda values: values.update({RERANK_KEY: string(template)}))
    report = inspect(str(folder))
    (finding,) = report.findings
    assert finding.code == "gguf-own-instruction"
    assert finding.sentence.endswith("[red]\\x1b[2J\\n\\udc80" + "x" * 188 + "…")
    assert "[red]" in rendered(report)
    json.dumps(report.to_dict(), ensure_ascii=False).encode()


def test_the_demo_models_are_known_by_name():
    assert not inspect("qtool-demo-reranker").broken


@pytest.mark.parametrize(
    "target", ["nowhere", "a/b/c", "./missing", "~/x", "hf://lonely", "missing/model.gguf/x", "a/m.gguf", "tests/m"]
)
def test_what_is_neither_here_nor_a_repository_is_a_usage_error(target):
    with pytest.raises(UsageError, match="Not a local file, a local folder or a Hub repository"):
        inspect(target)


def test_a_folder_without_models_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ModelError, match="holds neither GGUF nor safetensors"):
        inspect(str(tmp_path))


def test_a_file_that_is_no_model_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        inspect(str(tmp_path / "notes.txt"))


def test_a_local_path_has_no_revision(made):
    with pytest.raises(UsageError, match="has no revisions"):
        inspect(str(made("reranker")), revision="v1")
