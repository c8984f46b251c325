"""The sessions in the docs show what the commands print."""

from __future__ import annotations

import re

import pytest

from tests import docs_examples

NUMBER = r"[-+]?\d[\d.,]*(e[-+]?\d+)?"
PAGES = [page for page in docs_examples.PAGES if docs_examples.SESSION.search(page.read_text())]


COMMAND = r"\$ |llama-server |vllm |python "
"""How the lines begin that are commands: to type, or printed by serve-command."""


def without_numbers(text):
    """A text without what differs between machines: numbers, and the widths of tables that follow from them."""
    lines = (line if re.match(COMMAND, line) else re.sub(NUMBER, "0", line) for line in text.splitlines())
    return re.sub(r"[ ━─]+", " ", "\n".join(lines))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_output_shown_is_what_the_commands_print(page, tmp_path):
    text = page.read_text()
    assert without_numbers(docs_examples.with_output(text, tmp_path)) == without_numbers(text), "run `make docs`"
