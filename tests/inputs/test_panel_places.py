"""Where messages say that something in a panel stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.inputs.items import Item
from qtool.inputs.panels import load_panel

LINE = b'{"query": "a", "documents": ["x"]}\n'


def test_an_item_knows_its_query_and_line_and_is_the_same_without(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(LINE + b"\n" + LINE)
    first, second = load_panel(path).queries
    assert first.documents[0].name == "Item 'd1' (query 'q1', mine.jsonl, line 1)"
    assert second.documents[0].name == "Item 'd1' (query 'q2', mine.jsonl, line 3)"
    assert second.item.name == "Item 'q2' (mine.jsonl, line 3)"
    assert first.documents == second.documents == (Item("d1", ("x",)),)
    assert Item("d1").name == "Item 'd1'"


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"\xe9", "line 1: Byte 1"), (b"a\n\nabc\xe9\n", "line 3: Byte 4 is 0xe9")],
)
def test_bytes_that_are_no_utf8_are_found_by_line_and_place(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"latin\.jsonl, {place}") as caught:
        load_panel(path)
    assert caught.value.hint == "Save the file as UTF-8."
