from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qtool import resources
from qtool.errors import UsageError
from qtool.inputs.items import Item, PixelLimits, Video
from qtool.inputs.panels import load_panel, panel_header

QUERY = {
    "id": "q1",
    "query": "which ball?",
    "documents": [{"id": "a", "text": "red", "label": 2}, {"text": "", "label": 0}],
}
FIELDS = {"name": "balls", "license": "CC0-1.0", "modality": "text", "labels": "graded", "instruction": "Find it."}


def lines(*values: Any) -> bytes:
    return b"".join((value if isinstance(value, str) else json.dumps(value)).encode() + b"\n" for value in values)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def panel_file(folder: Path, *queries: Any, **fields: Any) -> Path:
    content = lines(*queries)
    return write(folder / "panel.jsonl", panel_header(content, **{**FIELDS, **fields}) + content)


def test_a_published_panel(tmp_path: Path) -> None:
    other = {**QUERY, "id": "q2", "query": {"text": ["two", "texts"]}, "instruction": "Mind the colour."}
    panel = load_panel(panel_file(tmp_path, QUERY, other))
    assert (panel.name, panel.license, panel.modality, panel.labels) == ("balls", "CC0-1.0", "text", "graded")
    assert panel.sha256 == hashlib.sha256(lines(QUERY, other)).hexdigest()
    first, second = panel.queries
    assert first.item == Item("q1", ("which ball?",), instruction="Find it.")
    assert first.documents == (Item("a", ("red",), label=2), Item("d2", ("",), label=0))
    assert second.item == Item("q2", ("two", "texts"), instruction="Mind the colour.")
    assert first.labels == (2, 0)
    assert [pair.name for pair in panel.pairs][:2] == ["query 'q1', document 'a'", "query 'q1', document 'd2'"]
    assert not panel.has_pictures


def test_a_users_own_panel_needs_no_header(tmp_path: Path) -> None:
    content = lines({"query": "a", "documents": ["x", "y"]}, "", {"query": "b", "documents": ["x"]})
    panel = load_panel(write(tmp_path / "mine.jsonl", content))
    assert (panel.name, panel.modality, panel.labels, panel.license) == ("mine", "text", "none", "")
    assert panel.sha256 == hashlib.sha256(content).hexdigest()
    assert [query.id for query in panel.queries] == ["q1", "q2"]
    assert [document.id for document in panel.queries[0].documents] == ["d1", "d2"]
    assert panel.queries[0].labels is None
    assert panel.queries[0].item.instruction is None


def test_labels_and_modality_of_a_headerless_panel_are_what_it_holds(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    picture, text = {"image": "p.png", "label": 1}, {"text": "t", "label": 0}
    for documents, modality in (([picture], "image"), ([picture, text], "mixed"), ([text], "text")):
        panel = load_panel(write(tmp_path / "mine.jsonl", lines({"query": "a", "documents": documents})))
        assert (panel.modality, panel.labels) == (modality, "binary")


def test_videos_are_files_or_frames_with_settings_of_their_own(tmp_path: Path) -> None:
    for name in ("a.mp4", "0.png"):
        (tmp_path / name).touch()
    film, address = str(tmp_path / "a.mp4"), "https://example.org/b.mp4"
    listed = {"frames": ["0.png", "https://example.org/1.png"], "max_frames": 3}
    documents = [
        {"video": "a.mp4"},
        {"video": ["a.mp4", {"file": address, "fps": 2, "max_frames": 9}], "text": "t"},
        {"video": listed, "max_pixels": 9999, "total_pixels": 77},
    ]
    panel = load_panel(write(tmp_path / "mine.jsonl", lines({"query": {"video": "a.mp4"}, "documents": documents})))
    assert (panel.modality, panel.has_pictures) == ("video", True)
    assert panel.queries[0].item.video == (Video(film),)
    one, two, three = panel.queries[0].documents
    assert one.video == (Video(film),)
    assert two.video == (Video(film), Video(address, 2, 9))
    assert three.video == (Video((str(tmp_path / "0.png"), "https://example.org/1.png"), max_frames=3),)
    assert (one.limits, three.limits) == (PixelLimits(), PixelLimits(max_pixels=9999, total_pixels=77))


@pytest.mark.parametrize(
    ("query", "documents", "modality"),
    [
        ("a", [{"video": "a.mp4"}, {"text": "t"}], "mixed"),
        ("a", [{"video": "a.mp4"}, {"image": "a.mp4"}], "mixed"),
        ({"video": "a.mp4"}, [{"image": "a.mp4"}], "mixed"),
        ({"image": "a.mp4"}, [{"video": "a.mp4", "text": "t"}], "video"),
    ],
)
def test_a_panel_is_of_videos_where_each_document_has_one(
    tmp_path: Path, query: Any, documents: list[Any], modality: str
) -> None:
    (tmp_path / "a.mp4").touch()
    content = lines({"query": query, "documents": documents})
    assert load_panel(write(tmp_path / "mine.jsonl", content)).modality == modality


def test_pictures_are_found_beside_the_panel_and_urls_stay(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "p.png")
    document = {"image": ["pictures/p.png", "data:image/png;base64,AAAA"], "label": 1}
    query = {"query": {"image": "pictures/p.png"}, "documents": [document]}
    panel = load_panel(panel_file(tmp_path, query, modality="image", labels="binary"))
    assert panel.has_pictures
    found = panel.queries[0].documents[0].image
    assert found == (str(tmp_path / "pictures" / "p.png"), "data:image/png;base64,AAAA")
    assert panel.queries[0].item.image == (str(tmp_path / "pictures" / "p.png"),)


def test_the_first_queries_of_a_panel(tmp_path: Path) -> None:
    panel = load_panel(panel_file(tmp_path, QUERY, {**QUERY, "id": "q2"}))
    assert [query.id for query in panel.first(1).queries] == ["q1"]
    assert panel.first(1).sha256 == panel.sha256
    assert panel.first(None) == panel.first(9) == panel


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    content = json.dumps({"query": text, "documents": ["x"]}, ensure_ascii=False).encode()
    assert load_panel(write(tmp_path / "p.jsonl", content)).queries[0].item.text == (text,)


DOCUMENT = {"text": "t", "label": 1}


def with_document(**fields: Any) -> dict[str, Any]:
    return {"id": "q1", "query": "a", "documents": [DOCUMENT, {"id": "b", "text": "t", "label": 1, **fields}]}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("{not json", "line 2: Invalid JSON"),
        ([1, 2], r'line 2: Expected an object \{"query": …, "documents": \[…\]\}\.$'),
        ({"id": "q1", "documents": ["x"]}, "line 2: query: Field required"),
        ({"query": "a", "documents": []}, "line 2: documents: "),
        ({"query": "a", "docs": ["x"]}, "line 2: docs: |line 2: documents: Field required"),
        ({"query": {"txt": "a"}, "documents": [DOCUMENT]}, "line 2: query.txt: Extra inputs"),
        ({"query": {}, "documents": [DOCUMENT]}, "line 2: query: No text, image or video"),
        ({"query": 7, "documents": [DOCUMENT]}, "line 2: query: Expected a text, or an object with text, image or"),
        ({"query": "a", "documents": [7]}, r"line 2: documents\[0\]: Expected a text, or an object with text"),
        (with_document(texts="x"), r"line 2: documents\[1\].texts: Extra inputs"),
        (with_document(text=None), r"line 2: documents\[1\]: No text, image or video"),
        (with_document(text=[1]), r"line 2: documents\[1\].text\[0\]: "),
        (with_document(text=3), r"line 2: documents\[1\].text: "),
        (with_document(id="d1"), r"line 2: documents\[1\].id: Document 'd1' exists already"),
        (with_document(id=""), r"line 2: documents\[1\].id: "),
        (with_document(label="2"), r"line 2: documents\[1\].label: "),
        (with_document(label=True), r"line 2: documents\[1\].label: .*true or false"),
        (with_document(label=-1), r"line 2: documents\[1\].label: "),
        (with_document(label=float("nan")), r"line 2: documents\[1\].label: "),
        (with_document(label=1500), r"line 2: documents\[1\].label: .*100"),
        (with_document(label=None), r"line 2: documents\[1\].label: Missing"),
        (with_document(video="gone.mp4"), r"line 2: documents\[1\].video: No such file: gone.mp4"),
        (with_document(video={"frames": ["gone.png"]}), r"line 2: documents\[1\].video: No such file: gone.png"),
        (with_document(video={"frames": []}), r"line 2: documents\[1\].video\[0\].frames: "),
        (with_document(video={"fps": 2}), r"line 2: documents\[1\].video\[0\]: Expected either file or frames"),
        (with_document(video={"frames": ["data:,"], "fps": 2}), r"video\[0\]: .*fps applies to a file"),
        (with_document(video={"file": "a.mp4", "fps": 0}), r"line 2: documents\[1\].video\[0\].fps: "),
        (with_document(video={"file": "a.mp4", "speed": 2}), r"line 2: documents\[1\].video\[0\].speed: Extra inputs"),
        (with_document(video=["a.mp4", 7]), r"line 2: documents\[1\].video\[1\]: Expected a path, or"),
        (with_document(max_pixels=0), r"line 2: documents\[1\].max_pixels: "),
        (with_document(min_pixels=99, max_pixels=98), r"line 2: documents\[1\]: min_pixels is 99 and max_pixels 98"),
        (with_document(image="gone.png"), r"line 2: documents\[1\].image: No such file: gone.png"),
        (with_document(image="x" * 5000), r"line 2: documents\[1\].image: No such file"),
        (with_document(image="nul\0"), r"line 2: documents\[1\].image: No such file"),
        (with_document(text="a \ud83d"), r"line 2: documents\[1\].text\[0\]: Text contains a lone surrogate"),
        (with_document(id="\ud83d"), r"line 2: documents\[1\].id: "),
        ({"query": "a \ud83d", "documents": ["x"]}, r"line 2: query.text\[0\]: .*half of a character"),
        ({"query": "a", "instruction": "\udcff", "documents": ["x"]}, "line 2: instruction: .*half of a character"),
        ("[" * 100_000, "line 2: Invalid JSON: it is nested too deeply"),
        ('{"query": ' + "[" * 100_000, "line 2: Invalid JSON: it is nested too deeply"),
    ],
)
def test_a_broken_query_names_line_and_field(tmp_path: Path, query: Any, message: str) -> None:
    content = lines(query)
    header = panel_header(content, **FIELDS)
    with pytest.raises(UsageError, match=message) as caught:
        load_panel(write(tmp_path / "panel.jsonl", header + content))
    assert "panel.jsonl" in caught.value.message


def test_a_query_id_that_recurs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 3: id: Query 'q1' exists already"):
        load_panel(panel_file(tmp_path, QUERY, QUERY))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": "binary"}, "labels: The header declares 'binary'; the documents are 'graded'"),
        ({"labels": "none"}, "labels: The header declares 'none'"),
        ({"modality": "image"}, "modality: The header declares 'image'; the items are 'text'"),
    ],
)
def test_a_header_that_does_not_fit_its_lines_is_refused(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_panel(panel_file(tmp_path, QUERY, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": "some"}, "labels: "),
        ({"modality": "sound"}, "modality: "),
        ({"name": ""}, "name: "),
        ({"colour": "red"}, "colour: Extra inputs"),
    ],
)
def test_a_header_is_not_written_with_fields_it_does_not_have(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        panel_header(b"", **{**FIELDS, **fields})


def test_a_panel_changed_after_its_header_was_written_is_refused(tmp_path: Path) -> None:
    path = panel_file(tmp_path, QUERY)
    path.write_bytes(path.read_bytes().replace(b"red", b"rad"))
    with pytest.raises(UsageError, match="line 1: sha256: The header declares"):
        load_panel(path)


def test_a_header_of_another_version_is_refused(tmp_path: Path) -> None:
    path = panel_file(tmp_path, QUERY)
    path.write_bytes(path.read_bytes().replace(b'"qtool_panel": 1', b'"qtool_panel": 2'))
    with pytest.raises(UsageError, match="line 1: qtool_panel: "):
        load_panel(path)


def test_an_unlabelled_query_of_a_labelled_panel_is_named(tmp_path: Path) -> None:
    bare = {"id": "q2", "query": "a", "documents": ["x"]}
    with pytest.raises(UsageError, match="query 'q2' has none"):
        load_panel(panel_file(tmp_path, QUERY, bare))


def test_files_that_are_no_panels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read panel"):
        load_panel(tmp_path / "gone.jsonl")
    with pytest.raises(UsageError, match="contains no queries"):
        load_panel(write(tmp_path / "empty.jsonl", b"\n"))
    with pytest.raises(UsageError, match="not UTF-8"):
        load_panel(write(tmp_path / "latin.jsonl", b'{"query": "\xe9"}'))


def test_a_first_line_of_brackets_is_no_header_and_named(tmp_path: Path) -> None:
    for line in ("[" * 100_000, '{"qtool_panel": ' + "[" * 100_000):
        with pytest.raises(UsageError, match=r"deep\.jsonl, line 1: Invalid JSON: it is nested too deeply"):
            load_panel(write(tmp_path / "deep.jsonl", lines(line)))


def test_a_headers_instruction_is_text_as_well(tmp_path: Path) -> None:
    path = panel_file(tmp_path, QUERY)
    path.write_bytes(path.read_bytes().replace(b"Find it.", b"Find \\ud83d."))
    with pytest.raises(UsageError, match=r"line 1: instruction: .*half of a character"):
        load_panel(path)


def test_both_halves_of_a_character_are_one(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", lines('{"query": "\\ud83d\\ude00", "documents": ["x"]}'))
    assert load_panel(path).queries[0].item.text == ("\U0001f600",)


def test_the_built_in_panels_load() -> None:
    for path in resources.path("calibration/panels").glob("*.jsonl"):
        assert load_panel(path).license


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.lists(
        st.tuples(TEXT, st.lists(st.tuples(TEXT, st.integers(0, 4)), min_size=1, max_size=3)), min_size=1, max_size=4
    )
)
def test_whatever_json_carries_comes_back(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    queries = [
        {"query": text, "documents": [{"text": document, "label": label} for document, label in documents]}
        for text, documents in content
    ]
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", lines(*queries))
    found = [
        (query.item.joined_text, [(document.joined_text, document.label) for document in query.documents])
        for query in load_panel(path).queries
    ]
    assert found == content
