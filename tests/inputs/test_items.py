from __future__ import annotations

from typing import Any

import pytest

from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair


def test_several_texts_are_joined_without_a_separator() -> None:
    assert Item("d", ("a", "b ", "c")).joined_text == "ab c"
    assert Item("d").joined_text == ""


def test_an_item_under_another_instruction_is_otherwise_the_same() -> None:
    item = Item("q", ("t",), label=2.0)
    assert item.with_instruction("find") == Item("q", ("t",), instruction="find", label=2.0)
    assert item.instruction is None


def test_a_pair_is_named_by_its_ids() -> None:
    assert Pair(Item("q1"), Item("d'2")).name == "query 'q1', document \"d'2\""


@pytest.mark.parametrize(
    "fields", [{"text": ("a \ud83d",)}, {"instruction": "\udcff"}, {"text": (None,)}, {"text": (b"bytes",)}]
)
def test_an_item_of_what_is_no_text_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Item 'd': Invalid text"):
        Item("d", **fields)
