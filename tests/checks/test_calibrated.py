"""What a verification repeats of an artefact's calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qtool
from qtool.artefact import open_artefact
from qtool.calibration.data import load_calibration
from qtool.calibration.facts import calibration_facts
from qtool.checks.calibrated import calibration_findings
from qtool.inputs.builtin import load_panels
from tests.scoring.gguf_files import gguf_of

RERANKER = "qtool-demo-reranker"


@pytest.fixture(scope="module")
def facts():
    data = load_calibration(["demo-text"], limit=2)
    return calibration_facts(data, text_tokens=700, picture_tokens=0, widest=512, is_vision=True).to_dict()


@pytest.fixture
def folder(tmp_path):
    """An artefact whose manifest is then given facts."""
    qtool.quantize(RERANKER, output=tmp_path / "nvfp4", progress=None)

    def with_facts(facts):
        path = tmp_path / "nvfp4" / "qtool.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": facts}))
        return tmp_path / "nvfp4"

    return with_facts


def codes(target, *panels):
    found = calibration_findings(open_artefact(str(target)), load_panels(panels))
    return [(finding.code, finding.sentence) for finding in found]


def test_the_warnings_and_the_panel_are_repeated(folder, facts):
    found = codes(folder(facts), "demo-text", "demo-image")
    assert [code for code, _ in found] == ["calibration-warning"] * 3 + ["calibration-panel"]
    assert "700 tokens are fewer than 5 times the widest input (512 columns)" in found[0][1]
    assert "demo-text, which holds 28 of the 1,680 documents of panel demo-text" in found[3][1]


def test_a_panel_with_other_documents_is_not_named(folder, facts):
    assert codes(folder({**facts, "warnings": []}), "demo-image", "retrieval-text") == []


@pytest.mark.parametrize("facts", [None, {}, [], {"warnings": None, "contents": 3}, {"contents": "no keys!"}])
def test_a_manifest_without_facts_says_nothing(folder, facts):
    assert codes(folder(facts), "demo-text") == []


@pytest.mark.parametrize("name", ["qtool.json", "{}.qtool.json"])
def test_a_gguf_file_has_its_manifest_beside_it(name, facts, tmp_path):
    file = Path(gguf_of(qtool.resources.demo_model(RERANKER), "f16", tmp_path))
    for manifest in file.parent.glob("*qtool.json"):
        manifest.unlink()
    file.with_name(name.format(file.name)).write_text(json.dumps({"calibration": facts}))
    assert [code for code, _ in codes(file)] == ["calibration-warning"] * 3


def test_the_report_repeats_them(folder, facts):
    options = {"limit": 2, "noise_queries": 0, "use_cache": False, "progress": None}
    report = qtool.verify(folder(facts), reference=RERANKER, panels="demo-text", **options)
    structure = next(stage for stage in report.stages if stage.name == "structure")
    assert structure.outcome.value == "pass"
    assert {"calibration-warning", "calibration-panel"} <= {finding.code for finding in structure.findings}
