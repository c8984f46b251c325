from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import pytest
from PIL import Image

import qtool
from qtool.errors import UsageError
from qtool.inputs.builtin import builtin_panels, default_panels, find_panel
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import load_image
from tools.demo_models.evaluate import random_baseline
from tools.panels.__main__ import main
from tools.panels.build import IMAGE, PANELS, TEXT, picture_path
from tools.panels.charts import draw_chart
from tools.panels.pages import draw_page, text_width, wrap
from tools.panels.sources import LATIN, Chart, load_topics

NAMES = (TEXT, IMAGE)
DEMOS = ("demo-text", "demo-image", "demo-mixed")
LANGUAGES = {"ar", "de", "en", "es", "fr", "hi", "it", "ja", "pt", "ru", "zh"}
TOPICS = load_topics()
DOCUMENTS = {document.id: document for topic in TOPICS for document in topic.documents}
ENTRIES = [(topic, entry) for topic in TOPICS for entry in topic.entries]
panels = pytest.mark.parametrize("name", NAMES)


def lines(name):
    return [json.loads(line) for line in find_panel(name).read_text(encoding="utf-8").splitlines()][1:]


def graded(line, label):
    return [document for document in line["documents"] if document["label"] == label]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder that the program wrote into, and that held a picture of an older panel."""
    folder = tmp_path_factory.mktemp("made")
    (folder / IMAGE).mkdir()
    (folder / IMAGE / "old-00000000.png").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["panels", "-o", str(folder)])
        main()
    return folder


@panels
def test_a_general_panel_is_chosen_by_name_and_its_header_is_true(name):
    panel = load_panel(find_panel(name))  # which checks hash, modality and labels
    assert (panel.name, panel.license, panel.labels) == (name, "Apache-2.0", "graded")
    assert panel.modality == {TEXT: "text", IMAGE: "image"}[name]
    assert name in builtin_panels()


def test_real_models_get_them_by_default_and_demo_models_their_own():
    assert default_panels(is_vision=True, is_demo=False) == NAMES
    assert default_panels(is_vision=False, is_demo=False) == NAMES[:1]
    assert default_panels(is_vision=True, is_demo=True) == DEMOS
    assert default_panels(is_vision=False, is_demo=True) == DEMOS[:1]


@panels
def test_a_hundred_queries_of_eight_documents_that_chance_does_not_order(name):
    panel = load_panel(find_panel(name))
    assert len(panel.queries) >= 110
    assert {len(query.documents) for query in panel.queries} == {8}
    assert random_baseline(panel, rounds=5) < 0.66


def test_both_panels_with_all_pictures_stay_below_two_megabytes():
    files = [find_panel(TEXT), find_panel(IMAGE), *(PANELS / IMAGE).iterdir()]
    assert sum(path.stat().st_size for path in files) < 2_000_000


@panels
def test_each_query_has_one_answer_one_partial_answer_and_both_kinds_of_wrong_ones(name):
    for line in lines(name):
        labels = Counter(document["label"] for document in line["documents"])
        assert (labels[3], labels[2]) == (1, 1)
        assert (labels[1], labels[0]) in ((3, 3), (4, 2))


@panels
def test_grades_follow_from_what_a_document_was_written_for(name):
    for line in lines(name):
        query = DOCUMENTS[line["id"]]
        for document in line["documents"]:
            found = DOCUMENTS[document["id"]]
            if document["label"] >= 2:
                assert (found.entry is query.entry, found.is_partial) == (True, document["label"] == 2)
            elif document["label"] == 1:
                is_sibling = found.topic is query.topic and found.entry is not query.entry
                is_translated = found.topic.language != query.topic.language
                assert is_sibling or (is_translated and found.entry.subject == query.entry.subject is not None)
            else:
                assert found.topic.field != query.topic.field


@panels
def test_no_answer_and_no_query_stands_twice(name):
    answers = [graded(line, 3)[0] for line in lines(name)]
    queries = [line["query"]["text"] for line in lines(name)]
    assert len({answer.get("text") or answer["image"] for answer in answers}) == len(answers)
    assert len(set(queries)) == len(queries)
    assert not set(queries) & {document.text for document in DOCUMENTS.values()}


@panels
def test_nothing_is_shared_with_a_demo_panel(name):
    def contents(panel):
        items = chain.from_iterable((query.item, *query.documents) for query in load_panel(find_panel(panel)).queries)
        return {(item.text, item.image) for item in items}

    assert not any(contents(name) & contents(demo) for demo in DEMOS)


@pytest.mark.parametrize(("name", "languages"), [(TEXT, LANGUAGES), (IMAGE, LATIN)])
def test_the_first_queries_have_every_language(name, languages):
    first = [DOCUMENTS[line["id"]].topic.language for line in lines(name)[:30]]
    assert set(first) == languages
    counts = Counter(DOCUMENTS[line["id"]].topic.language for line in lines(name))
    assert all(counts[language] >= 8 for language in languages)


def test_queries_are_of_many_kinds():
    kinds = Counter(entry.kind for _, entry in ENTRIES)
    assert all(count >= 8 for count in kinds.values())
    assert len(kinds) == 6
    assert sum(entry.query_language not in (None, topic.language) for topic, entry in ENTRIES) >= 5
    assert sum(entry.subject is not None for _, entry in ENTRIES) >= 20


def test_passages_have_the_length_of_passages():
    for document in DOCUMENTS.values():
        if document.text:
            is_spaced = document.topic.language not in ("zh", "ja")
            length = len(document.text.split()) if is_spaced else len(document.text) // 2
            low, high = (20, 90) if document.is_partial else (40, 120)
            assert low <= length <= high, document.id


@panels
def test_the_shipped_panel_is_what_its_sources_build(name, made):
    assert (made / f"{name}.jsonl").read_bytes() == find_panel(name).read_bytes()


def test_the_shipped_pictures_are_what_their_sources_draw(made):
    names = {path.name for path in (PANELS / IMAGE).iterdir()}
    assert {path.name for path in (made / IMAGE).iterdir()} == names  # the old one is gone
    for name in names:
        with Image.open(PANELS / IMAGE / name) as shipped, Image.open(made / IMAGE / name) as drawn:
            assert shipped.convert("RGB").tobytes() == drawn.convert("RGB").tobytes(), name


def test_the_panel_s_hash_stands_for_the_pixels_since_paths_name_them():
    pictures = {document["image"]: document["id"] for line in lines(IMAGE) for document in line["documents"]}
    for path, name in pictures.items():
        assert path == picture_path(name, load_image(PANELS / path))


def test_the_image_panel_has_pages_tables_and_all_charts():
    shown = [DOCUMENTS[line["id"]].entry for line in lines(IMAGE)]
    assert {entry.chart.type for entry in shown if entry.chart} == {"bar", "line", "pie"}
    assert sum(entry.chart is not None for entry in shown) == 32
    assert sum(entry.table is not None for entry in shown) >= 12


def test_a_picture_that_is_missing_is_named(made):
    path = lines(IMAGE)[0]["documents"][0]["image"]
    (made / path).rename(made / "elsewhere.png")
    with pytest.raises(UsageError, match=f"No such file: {path}"):
        load_panel(made / f"{IMAGE}.jsonl")
    (made / "elsewhere.png").rename(made / path)
    assert load_panel(made / f"{IMAGE}.jsonl").sha256 == load_panel(find_panel(IMAGE)).sha256


def test_accents_are_drawn_and_what_cannot_be_is_refused():
    letters = ["e", "é", "è", "ê", "i", "í", "ì", "ï", "a", "ä", "ã", "c", "ç", "n", "ñ"]
    pages = {draw_page("Page", letter, None, 0).tobytes() for letter in letters}
    assert len(pages) == len(letters)
    assert text_width("é", 14) == text_width("e", 14)
    with pytest.raises(ValueError, match=r"no 'Ж' \(U\+0416\)"):
        draw_page("Page", "Жук", None, 0)


def test_no_line_of_a_page_is_wider_than_asked():
    for document in DOCUMENTS.values():
        if document.topic.language in LATIN and document.text:
            found = wrap(document.text, 14, 300)
            assert " ".join(found).split() == document.text.split()
            assert max(text_width(line, 14) for line in found) <= 300


@pytest.mark.parametrize("kind", ["bar", "line", "pie"])
def test_a_chart_shows_its_numbers(kind):
    first, second = ({"A": 3.0, "B": value, "C": 5.0} for value in (4.0, 1.0))
    charts = [Chart(type=kind, title="Harvest", x="Plot", y="t", data=data) for data in (first, second)]
    assert draw_chart(charts[0]).tobytes() != draw_chart(charts[1]).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_scores_it(name):
    options = qtool.ScoreOptions(target="qtool-demo-reranker", panel=qtool.PanelChoice(source=name, limit=1))
    assert len(qtool.score(options).pairs) == 8
