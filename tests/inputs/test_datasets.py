"""Data sets as panels; real files read by the real package."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from qtool.errors import UsageError
from qtool.inputs.datasets import DatasetSpec, dataset_lines, load_dataset_panel, parse_dataset, read_row
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import load_image
from tests import hub

PAIRS = [{"question": f"what is {n}?", "answer": f"it is {n}", "wrong": [f"not {n}", f"never {n}"]} for n in range(9)]
QA = "query=question,positive=answer"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", PAIRS)


def texts(spec: DatasetSpec) -> list[list[tuple[str, float | None]]]:
    return [[(item.joined_text, item.label) for item in query.documents] for query in load_dataset_panel(spec).queries]


def test_positives_and_negatives_become_labelled_documents(pairs: str) -> None:
    panel = load_dataset_panel(parse_dataset(pairs, f"{QA},negative=wrong", limit=3, instruction="Judge."))
    assert (panel.name, panel.modality, panel.labels) == (pairs, "text", "binary")
    assert [query.id for query in panel.queries] == ["q1", "q2", "q3"]
    first = panel.queries[0]
    assert (first.item.joined_text, first.item.instruction) == ("what is 0?", "Judge.")
    assert [(item.id, item.joined_text, item.label) for item in first.documents] == [
        ("d1", "it is 0", 1),
        ("d2", "not 0", 0),
        ("d3", "never 0", 0),
    ]


def test_without_negatives_they_are_drawn_by_seed_from_the_others_positives(pairs: str) -> None:
    spec = parse_dataset(pairs, QA, negatives=3)
    drawn = texts(spec)
    answers = {row["answer"] for row in PAIRS}
    for row, documents in zip(PAIRS, drawn, strict=True):
        assert documents[0] == (row["answer"], 1)
        negatives = {text for text, label in documents[1:] if label == 0}
        assert len(negatives) == 3
        assert negatives < answers - {row["answer"]}
    assert texts(spec) == drawn
    assert texts(parse_dataset(pairs, QA, negatives=3, seed=1)) != drawn
    assert all(len(documents) == 9 for documents in texts(parse_dataset(pairs, QA, negatives=99)))


def test_the_hash_is_that_of_the_lines_and_they_make_the_same_panel_as_a_file(pairs: str, tmp_path: Path) -> None:
    spec = parse_dataset(pairs, QA, limit=5)
    panel = load_dataset_panel(spec)
    (tmp_path / "written.jsonl").write_bytes(dataset_lines(spec)[0])
    written = load_panel(tmp_path / "written.jsonl")
    assert (written.sha256, written.queries) == (panel.sha256, panel.queries)
    assert load_dataset_panel(parse_dataset(pairs, QA, limit=4)).sha256 != panel.sha256


def test_rows_of_one_query_are_joined_and_no_positive_is_its_own_negative(tmp_path: Path) -> None:
    rows = [
        {"q": "a", "p": "x", "n": "y"},
        {"q": "b", "p": "z", "n": "x"},
        {"q": "a", "p": "y", "n": "w"},
        {"q": "c", "p": "v", "n": "u"},
        {"q": "a", "p": "too late", "n": "t"},
    ]
    spec = parse_dataset(write(tmp_path / "rows.jsonl", rows), "query=q,positive=p,negative=n", limit=2)
    assert texts(spec) == [[("x", 1), ("y", 1), ("w", 0)], [("z", 1), ("x", 0)]]


def test_lists_of_documents_keep_their_labels(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "q": "a", "docs": ["x", "y"], "grades": [2, 0]},
        {"id": 8, "q": "b", "docs": ["z"], "grades": [1]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    panel = load_dataset_panel(parse_dataset(path, "id=id,query=q,documents=docs,labels=grades"))
    assert [query.id for query in panel.queries] == ["7", "8"]
    assert panel.labels == "graded"
    assert panel.queries[0].labels == (2, 0)
    assert load_dataset_panel(parse_dataset(path, "query=q,documents=docs")).labels == "none"


def test_a_document_that_is_listed_twice_has_its_highest_label(tmp_path: Path) -> None:
    rows = [
        {"q": "a", "docs": ["x", "y", "x"], "grades": [1, 0, 0]},
        {"q": "b", "docs": ["x", "y"], "grades": [1, 0]},
        {"q": "b", "docs": ["y", "x"], "grades": [2, 0]},
    ]
    spec = parse_dataset(write(tmp_path / "rows.jsonl", rows), "query=q,documents=docs,labels=grades")
    assert texts(spec) == [[("x", 1), ("y", 0)], [("x", 1), ("y", 2)]]


def test_queries_that_have_no_id_of_their_own_are_numbered(tmp_path: Path) -> None:
    rows = [{"id": name, "q": f"which {place}?", "p": f"{place}"} for place, name in enumerate(["x", None, None])]
    panel = load_dataset_panel(parse_dataset(write(tmp_path / "rows.jsonl", rows), "id=id,query=q,positive=p"))
    assert [query.id for query in panel.queries] == ["x", "q2", "q3"]


def test_labels_for_unknown_documents_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"q": "a", "docs": ["x"], "grades": [1, 0]}])
    with pytest.raises(UsageError, match=r"row 1: The number of labels \(2\) differs from that of documents \(1\)"):
        load_dataset_panel(parse_dataset(path, "query=q,documents=docs,labels=grades"))


def test_pictures_of_a_parquet_file_come_as_the_bytes_that_it_holds(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((40, 50, 3), shade, dtype=np.uint8)) for shade in (10, 200)]
    rows = {"text": ["dark", "light"], "picture": pictures, "others": [[pictures[1]], [pictures[0]]]}
    features = datasets.Features(
        {"text": datasets.Value("string"), "picture": datasets.Image(), "others": datasets.List(datasets.Image())}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    spec = parse_dataset(
        str(tmp_path / "rows.parquet"),
        "query=text,positive_image=picture,negative_image=others,positive=text,negative=text",
    )
    panel = load_dataset_panel(spec)
    assert panel.modality == "image"
    for query, shade in zip(panel.queries, (10, 200), strict=True):
        positive, negative = query.documents
        assert load_image(positive.image[0]).getpixel((0, 0)) == (shade,) * 3
        assert load_image(negative.image[0]).getpixel((0, 0)) == (210 - shade,) * 3
        assert positive.joined_text == query.item.joined_text
    stored = BytesIO()
    pictures[0].save(stored, "PNG")
    assert len(panel.queries[0].documents[0].image[0]) == pytest.approx(len(stored.getvalue()) * 4 / 3, rel=0.2)


def test_a_folder_has_splits_and_a_csv_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", PAIRS[:4])
    write(folder / "test.jsonl", PAIRS[4:])
    assert load_dataset_panel(parse_dataset(str(folder), QA)).queries[0].item.joined_text == "what is 4?"
    assert load_dataset_panel(parse_dataset(f"{folder}#train", QA)).queries[0].item.joined_text == "what is 0?"
    with pytest.raises(UsageError, match=r"no split 'dev'") as caught:
        load_dataset_panel(parse_dataset(f"{folder}#dev", QA))
    assert "train" in caught.value.hint
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["a", "x"], ["b", "y"]])
    assert texts(parse_dataset(str(tmp_path / "rows.csv"), QA)) == [[("x", 1), ("y", 0)], [("y", 1), ("x", 0)]]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"q": "a", "p": None}, "query=q,positive=p", "row 2: positive is empty; expected a text"),
        ({"q": "a", "p": []}, "query=q,positive=p", "row 2: There is no content for positive"),
        ({"q": "a", "p": "x"}, "query=q,positive=gone", "row 1: There is no column 'gone'"),
        ({"q": "a", "p": "x"}, "query=q,positive_image=p", "positive_image is a str; expected a picture"),
        ({"q": "a", "p": "x", "l": ["bad"]}, "query=q,documents=p,labels=l", "Invalid label 'bad'"),
        (
            {"q": "a", "p": "x", "l": [101]},
            "query=q,documents=p,labels=l",
            "row 2: Invalid label 101: expected a number from 0 to 100",
        ),
    ],
)
def test_what_a_row_lacks_is_said_with_its_number(
    row: dict[str, Any], columns: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"q": "first", "p": ["x"], "l": [1]}, row])
    with pytest.raises(UsageError, match=message):
        load_dataset_panel(parse_dataset(path, columns))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("positive=p", "No column is given for the query"),
        ("query=q", "Expected a column for either documents or positive"),
        ("query=q,positive=p,documents=d", "Expected a column for either documents or positive"),
        ("query=q,positive=p,labels=l", "A column for labels needs one for documents"),
        ("query=q,colour=c", "Invalid --columns entry 'colour=c'"),
        ("query", "Invalid --columns entry 'query'"),
    ],
)
def test_columns_that_make_no_panel_are_refused_before_anything_is_read(columns: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_dataset("no/where", columns)


def test_a_data_set_is_spelt_with_config_and_split() -> None:
    spec = parse_dataset("org/name:english#dev", "query=q,positive=a,positive=b")
    assert (spec.path, spec.config, spec.split, spec.name) == ("org/name", "english", "dev", "org/name:english#dev")
    assert spec.columns == {"query": ("q",), "positive": ("a", "b")}
    assert parse_dataset("data/rows.jsonl", QA).path == "data/rows.jsonl"


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer"')
    (tmp_path / "one.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    for name, message in (
        ("rows.txt", r"Unknown file type of data set .*rows\.txt"),
        ("broken.jsonl", "Cannot read data set"),
        ("nowhere", "No such file or folder"),
        ("gone.jsonl", "No such file or folder"),
        ("one.jsonl", "no documents to draw negatives from"),
    ):
        with pytest.raises(UsageError, match=message):
            load_dataset_panel(parse_dataset(str(tmp_path / name), QA))


ON_THE_HUB = """
import json, sys
from qtool.errors import QtoolError
from qtool.inputs.datasets import load_dataset_panel, parse_dataset
for name in sys.argv[1:]:
    try:
        panel = load_dataset_panel(parse_dataset(name, "query=q,positive=p", limit=3))
    except QtoolError as error:
        print(json.dumps([error.exit_code, error.message]))
    else:
        print(json.dumps([0, [query.item.joined_text for query in panel.queries]]))
"""


def on_the_hub(endpoint: str, home: Path, *names: str, **more: str) -> list[tuple[int, Any]]:
    """The hub's address is read when its client is imported, hence a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **more}
    command = [sys.executable, "-c", ON_THE_HUB, *names]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_on_the_hub_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "test.jsonl", [{"q": f"q{n}", "p": f"p{n}"} for n in range(9)])
    with hub.serve(tmp_path / "data") as site:
        streamed, (code, message) = on_the_hub(site.url, tmp_path, "org/model", "org/absent")
    assert streamed == [0, ["q0", "q1", "q2"]]
    assert not list(tmp_path.rglob("*.arrow"))
    assert (code, "Cannot read data set org/absent" in message) == (2, True)


def test_a_hub_out_of_reach_is_the_networks_fault(tmp_path: Path) -> None:
    ((code, message),) = on_the_hub("http://127.0.0.1:9", tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert (code, "Cannot read data set org/model" in message) == (5, True)


def test_a_folder_of_pictures_gives_them_by_path(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for shade in (10, 200):
        Image.new("RGB", (40, 50), (shade,) * 3).save(folder / f"{shade}.png")
    write(folder / "metadata.jsonl", [{"file_name": f"{shade}.png", "text": f"grey {shade}"} for shade in (10, 200)])
    panel = load_dataset_panel(parse_dataset(str(folder), "query=text,positive_image=image"))
    for query in panel.queries:
        shade = int(query.item.joined_text.removeprefix("grey "))
        assert load_image(query.documents[0].image[0]).getpixel((0, 0)) == (shade,) * 3
        assert query.documents[0].image[0].startswith("data:")


def test_a_picture_that_is_not_where_its_row_says_is_named(tmp_path: Path) -> None:
    row = {"q": "a", "p": {"path": str(tmp_path / "gone.png"), "bytes": None}}
    with pytest.raises(UsageError, match=r"row 1: positive_image: Cannot read .*gone\.png: No such file"):
        load_dataset_panel(parse_dataset(write(tmp_path / "rows.jsonl", [row]), "query=q,positive_image=p"))


def test_within_a_row_nothing_stands_twice_and_no_positive_is_negative(tmp_path: Path) -> None:
    rows = [{"q": "a", "p": ["x", "y", "x"], "n": ["y", "z", "z"]}, {"q": "b", "p": ["v"], "n": ["w"]}]
    spec = parse_dataset(write(tmp_path / "rows.jsonl", rows), "query=q,positive=p,negative=n")
    assert texts(spec) == [[("x", 1), ("y", 1), ("z", 0)], [("v", 1), ("w", 0)]]


@pytest.mark.parametrize("nothing", [[], None, ["x"]])
def test_a_query_without_a_negative_of_its_own_is_given_some(nothing: Any, tmp_path: Path) -> None:
    rows = [{"q": "a", "p": ["x"], "n": nothing}, {"q": "b", "p": ["v"], "n": ["w"]}]
    spec = parse_dataset(write(tmp_path / "rows.jsonl", rows), "query=q,positive=p,negative=n")
    assert texts(spec) == [[("x", 1), ("v", 0)], [("v", 1), ("w", 0)]]


def test_half_of_a_character_in_a_row_is_named() -> None:
    with pytest.raises(UsageError, match=r"row 1: query contains a lone surrogate"):
        read_row({"q": "\ud83d", "p": "x"}, {"query": ("q",), "positive": ("p",)}, "row 1")
