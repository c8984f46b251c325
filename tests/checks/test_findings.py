"""The catalogue of codes is complete, tested in full, and readable."""

from __future__ import annotations

import pytest

from qtool.checks.findings import INSPECTION_CODES, Severity, finding, listed, listed_are
from tests.checks import (
    test_checkpoint,
    test_gguf,
    test_gguf_nvfp4,
    test_gguf_parts,
    test_gguf_projector,
    test_remote,
    test_sources,
)

TESTS = (test_gguf, test_gguf_projector, test_gguf_nvfp4, test_gguf_parts, test_checkpoint, test_remote, test_sources)


def test_every_code_is_tested():
    assert {code for each in TESTS for code in each.CODES} == set(INSPECTION_CODES)


@pytest.mark.parametrize("code", INSPECTION_CODES)
def test_every_code_is_one_plain_sentence(code):
    sentence = INSPECTION_CODES[code].sentence
    assert sentence.endswith((".", "{instruction}", "{problem}"))
    assert sentence.count(". ") == 0
    assert INSPECTION_CODES[code].remedy == "" or INSPECTION_CODES[code].remedy.split()[0] in ("qtool", "hf")


def test_a_command_is_quoted_for_the_shell():
    found = finding("gguf-no-pooling", "my models/a.gguf", expected="RANK", task="rerank")
    assert found.remedy == "qtool repair-gguf 'my models/a.gguf' -o FIXED.gguf --task rerank"


def test_a_command_for_a_remote_file_names_a_local_one():
    found = finding("gguf-no-pooling", "hf://org/model/a.gguf", expected="RANK", task="rerank")
    assert found.remedy == "qtool repair-gguf FILE -o FIXED.gguf --task rerank"
    assert finding("gguf-task-undeclared", "hf://org/model/a.gguf", task="rerank", hint="").remedy == (
        "qtool inspect hf://org/model/a.gguf --task rerank"
    )


def test_facts_are_not_taken_for_templates():
    found = finding("gguf-own-instruction", "a.gguf", instruction="{file} {query}")
    assert found.sentence.endswith("{file} {query}")
    assert found.severity is Severity.NOTE


def test_many_names_are_counted():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a and 2 more"
    assert listed_are(["a"]) == "a is"
    assert listed_are(["a", "b"]) == "a and 1 more are"
