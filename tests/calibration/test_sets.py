"""The calibration sets that come with qtool: chosen by model, licensed, hashed, and nothing of a panel in them."""

from __future__ import annotations

import re

import pytest

from qtool import resources
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.calibration.data import default_sets, load_calibration, questions
from qtool.calibration.facts import _set_hashes
from qtool.errors import UsageError
from qtool.inputs.builtin import builtin_panels, calibration_sets, dataset_panel, load_panels
from qtool.inputs.overlap import PanelContents
from qtool.storage.hub import resolve
from tests.tiny import text_config, vl_config, write_checkpoint

SETS = calibration_sets()


@pytest.fixture(scope="module")
def sets():
    return {name: load_calibration([name]) for name in SETS}


def opened(path):
    return CheckpointArtefact(resolve(str(path), None, None))


def test_the_set_follows_from_the_model(tmp_path):
    assert default_sets(opened("qtool-demo-reranker")) == ("demo-calibration",)
    assert default_sets(opened(write_checkpoint(tmp_path / "text", text_config()))) == ("general-text",)
    assert default_sets(opened(write_checkpoint(tmp_path / "vl", vl_config()))) == ("general-text", "general-pictures")


def test_every_set_has_a_licence_and_its_hash(sets):
    assert sorted(panel.sha256 for panel in sets.values()) == sorted(_set_hashes())
    assert {name: panel.license for name, panel in sets.items()} == {
        "demo-calibration": "CC0-1.0",
        "general-pictures": "Apache-2.0 AND BSD-3-Clause AND PostgreSQL",
        "general-text": "Apache-2.0 AND BSD-3-Clause AND PostgreSQL",
    }


@pytest.mark.parametrize("panel", builtin_panels())
def test_no_document_of_a_set_is_in_a_panel(panel, sets):
    (loaded,) = load_panels([panel])
    contents = PanelContents(loaded)
    assert {name: contents.shared(data) for name, data in sets.items()} == dict.fromkeys(SETS, 0)
    assert contents.shared(loaded) == len(loaded.pairs)  # the comparison sees


def test_the_general_texts_are_many_and_in_many_languages(sets):
    """64 k tokens of Qwen3's tokenizer, which is not here: 96 k counted with it, and no text has 4.5 letters a token."""
    data = sets["general-text"]
    languages = {query.id.partition("-")[0] for query in data.queries}
    assert languages == {"ar", "da", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "tr", "zh"} - {"da"}
    letters = sum(len(document.joined_text) for query in data.queries for document in query.documents)
    assert letters / 4.5 > 64_000
    assert {query.id.partition("-")[0] for query in data.queries[:60]} >= {"de", "en", "es", "fr", "ja", "ko", "tr"}


def test_the_pictures_are_pages_charts_and_drawings_alone_and_with_texts(sets):
    documents = [document for query in sets["general-pictures"].queries for document in query.documents]
    assert {document.id.partition("-")[0] for document in documents} == {"page", "chart", "drawing"}
    forms = [(bool(document.joined_text), bool(document.image)) for document in documents]
    assert all(forms.count(form) >= 20 for form in ((True, True), (False, True), (True, False)))


@pytest.mark.parametrize("name", ["general-text", "general-pictures"])
def test_half_of_the_documents_belong_to_their_query_and_each_is_there_once(name, sets):
    queries = sets[name].queries
    labels = [label for query in queries for label in query.labels]
    assert 0.45 < sum(labels) / len(labels) < 0.55
    assert all((query.documents[0].id == query.id) == bool(query.labels[0]) for query in queries)
    assert len({query.documents[0].id for query in queries}) == len(queries)


def test_all_sets_together_are_small():
    folder = resources.path("calibration")
    files = [*folder.glob("*.jsonl"), *(folder / "general-pictures").iterdir(), folder / "SOURCES.md"]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_each_source_is_told_with_its_licence():
    page = resources.path("calibration/SOURCES.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| (?:httpd|django|django-messages|postgresql|own) .*$", page, re.MULTILINE):
        assert len(row.split("|")) == 7
    assert "Redistributions in binary form" in page  # of the BSD licence, which asks to be there
    assert "THE UNIVERSITY OF CALIFORNIA" in page


def test_several_sets_are_interleaved(sets):
    both = load_calibration(["general-text", "general-pictures"])
    assert both.name == "general-text+general-pictures"
    assert both.modality == "mixed"
    assert len(both.queries) == len(sets["general-text"].queries) + len(sets["general-pictures"].queries)
    first = [bool(query.documents[0].image) for query in both.queries[:70]]
    assert 4 <= sum(first) <= 16
    other = load_calibration(["general-pictures", "general-text"])
    assert other.sha256 != both.sha256


def test_panels_files_and_data_sets_are_data_too(tmp_path, sets):
    assert load_calibration(["demo-text"], limit=3).sha256 == load_panels(["demo-text"])[0].sha256
    path = tmp_path / "mine.jsonl"
    path.write_text('{"query": "a", "documents": ["b"]}')
    assert len(load_calibration([str(path)]).queries) == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "a", "p": "b"}\n{"q": "c", "p": "d"}')
    assert len(load_calibration([dataset_panel(str(rows), "query=q,positive=p")]).queries) == 2
    with pytest.raises(UsageError, match="Unknown calibration data 'general-txt'") as error:
        load_calibration(["general-txt"])
    assert "demo-calibration, general-pictures, general-text, demo-image" in error.value.hint
    assert len(sets) == 3


def test_a_question_is_asked_once(tmp_path):
    path = tmp_path / "twice.jsonl"
    line = '{"query": "a", "documents": ["b", "a", "b"]}'
    path.write_text(f"{line}\n{line}")
    data = load_calibration([str(path)])
    assert len(questions(data, Task.RERANK, None)) == 2
    items = questions(data, Task.EMBED, "Find it.")
    assert [(item.joined_text, item.instruction) for item in items] == [("a", "Find it."), ("b", None), ("a", None)]
