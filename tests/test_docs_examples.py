"""The sessions in the docs show what the commands print."""

from __future__ import annotations

import re

import pytest

from tests import docs_examples

PAGES = [page for page in docs_examples.PAGES if docs_examples.SESSION.search(page.read_text())]


def without_numbers(text):
    """A text without what differs between machines: numbers, and the widths of tables that follow from them."""
    return re.sub(r"[ ━─]+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_output_shown_is_what_the_commands_print(page, tmp_path):
    text = page.read_text()
    assert without_numbers(docs_examples.with_output(text, tmp_path)) == without_numbers(text), "run `make docs`"
