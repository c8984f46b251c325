"""How an artefact was made, as its manifest says, or else its own fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qtool
from qtool.artefact import open_artefact
from qtool.checks.reference import open_reference
from qtool.recipe import load_recipe
from qtool.reporting.words import made as words
from qtool.verify.made import Made, made_of, weights_of
from tests.tiny import text_config, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", text_config())


def write(folder: Path, **facts: object) -> Made | None:
    (folder / "qtool.json").write_text(json.dumps(facts))
    return made_of(open_artefact(str(folder)))


def test_a_manifest_gives_recipe_effort_and_data(folder: Path) -> None:
    recipe = load_recipe("nvfp4-w4a16-calibrated")
    calibration = {"effort": "fast", "name": "general-text", "tokens": 5731}
    found = write(folder, recipe={"name": recipe.recipe.name, "text": recipe.text}, calibration=calibration)
    assert found is not None
    assert (found.algorithm, found.effort, found.data, found.tokens) == ("calibrated", "fast", "general-text", 5731)
    assert words(found) == "nvfp4-w4a16-calibrated, effort fast, 5,731 tokens of general-text"


@pytest.mark.parametrize(
    "facts",
    [{}, {"recipe": 3, "calibration": [1]}, {"recipe": {"name": {}, "text": "a: ["}, "calibration": {"tokens": True}}],
)
def test_a_manifest_that_says_nothing_leaves_the_format(folder: Path, facts: dict[str, object]) -> None:
    assert write(folder, **facts) == Made(format="bfloat16")
    (folder / "qtool.json").write_text("{")
    assert made_of(open_artefact(str(folder))) == Made(format="bfloat16")
    assert made_of(None) is None
    assert words(None) == ""


def test_a_gguf_file_has_its_type(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    qtool.convert_gguf("qtool-demo-reranker", output=path, outtypes="q8_0", mmproj="none", progress=None)
    assert made_of(open_artefact(str(path))) == Made(format="Q8_0")


def test_the_reference_has_its_number_of_weights(folder: Path) -> None:
    plan = qtool.quantize("qtool-demo-reranker", dry_run=True, progress=None)
    assert weights_of(open_reference("qtool-demo-reranker")) == plan.source_bytes / 2  # all in BF16, the head tied
    (folder / "model.safetensors").write_bytes(b"")
    assert weights_of(open_reference(str(folder))) is None
