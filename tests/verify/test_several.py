"""Several artefacts at once: a report for each, a table, the worst verdict, and a reference that is scored once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qtool
from qtool.cli import app
from qtool.errors import ModelError, UsageError
from qtool.reporting.several import Reports, folder_names
from qtool.scoring.transformers.runtime import TransformersScorer
from tests.scoring import tiny

OPTIONS = {"task": "rerank", "device": "cpu", "noise_queries": 2, "use_cache": False, "progress": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reference, a good and a bad artefact of it, and one that is no model."""
    root = tmp_path_factory.mktemp("several")
    tiny.write_vl(root / "reference")
    for name, noise in (("good", 0.0), ("bad", 2.0)):
        shutil.copytree(root / "reference", root / name)
        torch.manual_seed(0)
        tensors = load_file(root / "reference" / "model.safetensors")
        changed = {key: each * (1 + noise * torch.randn_like(each)) for key, each in tensors.items()}
        save_file(changed, root / name / "model.safetensors")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{}")
    documents = [{"text": "a red ball", "label": 1}, {"text": "no", "label": 0}]
    lines = [{"query": f"which ball {number}?", "documents": documents} for number in range(4)]
    (root / "panel.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "recipe.yaml").write_text(
        "name: tiny\ndescription: for tests\nscheme: W4A16_NVFP4\nblock_size: 16\nalgorithm: max\nquantize: ['*_proj']\n"
        "keep: []\ngates:\n  log_odds_rmse: {max: 0.01}\n"
    )
    return root


def verify(folder: Path, *names: str, **options: object) -> Reports:
    common = {"reference": folder / "reference", "panels": folder / "panel.jsonl", "recipe": folder / "recipe.yaml"}
    return qtool.verify_all([folder / name for name in names], **common, **OPTIONS, **options)


def arguments(folder: Path, *names: str) -> list[str]:
    common = [
        "--reference",
        folder / "reference",
        "--panel",
        folder / "panel.jsonl",
        "--recipe",
        folder / "recipe.yaml",
    ]
    own = ["--task", "rerank", "--device", "cpu", "--noise-queries", "0"]
    return ["verify", *(str(folder / name) for name in names), *map(str, common), *own]


def test_each_artefact_has_a_report_of_its_own_and_the_reference_is_scored_once(folder, tmp_path, monkeypatch):
    asked = Counter()
    score = TransformersScorer.score

    def counted(scorer, pairs, answered):
        asked[scorer._opened.checkpoint.directory.name, scorer.identity.numbers] += len(pairs)
        return score(scorer, pairs, answered)

    monkeypatch.setattr(TransformersScorer, "score", counted)
    reports = verify(folder, "good", "bad", output=tmp_path / "out")
    assert [report.verdict.value for report in reports.reports] == ["pass", "fail"]
    assert reports.verdict.value == "fail"
    assert {name: count for (name, _), count in asked.items()} == {"reference": 4, "good": 8, "bad": 8}
    assert sorted(asked.values()) == [4, 8, 8, 8]  # the reference in float32 and, for two queries, in bf16
    for name in ("good", "bad"):
        made = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert made["artefact"]["name"] == str(folder / name)
        assert {path.name for path in (tmp_path / "out" / name / "answers").iterdir()} == {
            "artefact.jsonl",
            "reference.jsonl",
            "reference-bf16.jsonl",
        }
    assert json.loads((tmp_path / "out" / "reports.json").read_text()) == json.loads(json.dumps(reports.to_dict()))
    beside = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert beside["panels"][0]["metrics"][0]["differences"][1]["outcome"] == "worse"
    for name in ("good", "bad"):
        page = (tmp_path / "out" / name / "report.html").read_text()
        assert "Beside the other artefacts" in page
        assert "<h3>1 good" in page
        assert "<h3>2 bad" in page
    assert qtool.compare(tmp_path / "out").panels[0].metrics == reports.comparison.panels[0].metrics


def test_the_exit_code_is_that_of_the_worst_and_a_table_ends_the_output(folder):
    done = CliRunner().invoke(app, arguments(folder, "good", "good", "bad"), env={"COLUMNS": "200"})
    assert done.exit_code == 1
    side_by_side, _, table = done.stdout.partition("All artefacts")
    assert "good, the baseline\n" in side_by_side
    assert [word for word in table.split() if word in ("pass", "fail")] == ["pass", "pass", "fail"]
    assert CliRunner().invoke(app, arguments(folder, "good", "good")).exit_code == 0


def test_json_is_one_object_with_all_reports(folder):
    done = CliRunner().invoke(app, [*arguments(folder, "good", "bad"), "--json"])
    result = json.loads(done.stdout)
    assert (result["schema_version"], result["verdict"]) == (1, "fail")
    assert [each["report"]["verdict"] for each in result["artefacts"]] == ["pass", "fail"]
    alone = CliRunner().invoke(app, [*arguments(folder, "good"), "--json"])
    assert json.loads(alone.stdout)["verdict"] == "pass"
    assert "artefacts" not in json.loads(alone.stdout)


def test_an_artefact_that_cannot_be_judged_does_not_keep_the_others_from_it(folder):
    reports = verify(folder, "broken", "good")
    assert [each.word for each in reports.artefacts] == ["error", "pass"]
    assert isinstance(reports.errors[0], ModelError)
    assert not reports.passed
    assert reports.comparison is None
    assert CliRunner().invoke(app, arguments(folder, "broken", "good")).exit_code == 3
    assert CliRunner().invoke(app, arguments(folder, "broken", "bad")).exit_code == 1


def test_a_broken_reference_is_an_error_at_once(folder):
    with pytest.raises(ModelError, match="broken holds neither"):
        qtool.verify_all([folder / "good", folder / "bad"], reference=folder / "broken", **OPTIONS)


def test_an_interrupted_run_of_several_takes_up_what_is_finished(folder, tmp_path):
    output = tmp_path / "out"
    verify(folder, "good", "bad", output=output)
    with pytest.raises(UsageError, match="holds a finished verification"):
        verify(folder, "good", "bad", output=output)
    first = json.loads((output / "good" / "report.json").read_text())
    (output / "reports.json").unlink()
    (output / "good" / "report.html").write_text("")
    shutil.rmtree(output / "bad")
    again = verify(folder, "good", "bad", output=output)
    assert again.reports[0].seconds == first["seconds"]
    assert "2 bad" in (output / "good" / "report.html").read_text()
    (output / "reports.json").unlink()
    with pytest.raises(UsageError, match="holds a finished verification"):
        raise verify(folder, "good", "bad", output=output, limit=2).errors[0]
    assert len(verify(folder, "good", "bad", output=output, limit=2, force=True).reports) == 2


def test_folders_are_named_after_the_artefacts():
    names = [
        "a/Model-F16.gguf",
        "b/Model-F16.gguf",
        "hf://org/name@v1/Q8_0.gguf",
        "http://host:8000/v1/",
        "org/Name",
        ".",
    ]
    assert folder_names(names) == ["Model-F16", "Model-F16-2", "Q8_0", "v1", "Name", "artefact"]


def test_a_folder_of_several_gguf_files_counts_as_all_of_them(tmp_path):
    pytest.importorskip("xllamacpp")
    quants = tmp_path / "quants"
    qtool.convert_gguf("qtool-demo-reranker", output=quants, outtypes=["f16", "q8_0"], progress=None)
    reports = qtool.verify_all(quants, reference="qtool-demo-reranker", structure_only=True, progress=None)
    assert [Path(each.artefact).name[-9:] for each in reports.artefacts] == ["-F16.gguf", "Q8_0.gguf"]
    assert reports.passed
    with pytest.raises(UsageError, match="2 language models"):
        qtool.verify(quants, reference="qtool-demo-reranker", structure_only=True, progress=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'panel'"):
        qtool.verify_all(quants, reference="qtool-demo-reranker", panel="demo-text")
