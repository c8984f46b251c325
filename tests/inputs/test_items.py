from __future__ import annotations

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
