from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qtool.arch.spec import Task
from qtool.errors import SetupError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.joined_ledgers import copy_ledgers, read_ledgers
from qtool.scoring.ledger import open_ledger
from tests.scoring.test_ledger import IDENTITY, key_of

PAIRS = [Pair(Item(f"q{n}", (f"which {n}?",)), Item("d", ("this",))) for n in range(4)]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two ledgers with two answers each."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        with open_ledger(path, IDENTITY) as ledger:
            for place in (2 * number, 2 * number + 1):
                ledger.write(key_of(PAIRS[place]), PAIRS[place], float(place))
    return paths


def test_joined_ledgers_know_what_each_knew_and_nothing_more(parts: list[Path], tmp_path: Path) -> None:
    assert read_ledgers(parts, Task.RERANK).score(PAIRS) == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(UsageError, match=r"No run has answered query 'q2', document 'd', nor 1 more\."):
        read_ledgers(parts[:1], Task.RERANK).score(PAIRS)
    copy_ledgers(parts, tmp_path / "new" / "whole.jsonl")
    with open_ledger(tmp_path / "new" / "whole.jsonl", IDENTITY) as whole:
        assert [whole[key_of(pair)] for pair in PAIRS] == [0.0, 1.0, 2.0, 3.0]


def test_the_parts_are_only_read(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts[0].write_bytes(parts[0].read_bytes() + b'{"key": "torn')
    before = [part.read_bytes() for part in parts]
    for part in parts:
        part.chmod(0o400)
    monkeypatch.setattr("os.open", None)  # which could make or change them
    assert read_ledgers(parts, Task.RERANK).score(PAIRS) == [0.0, 1.0, 2.0, 3.0]
    copy_ledgers(parts, tmp_path / "whole.jsonl")
    assert [part.read_bytes() for part in parts] == before
    assert b"torn" not in (tmp_path / "whole.jsonl").read_bytes()


def test_a_part_that_is_not_there_is_not_made(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"c\.jsonl cannot be read: No such file"):
        read_ledgers([*parts, tmp_path / "c.jsonl"], Task.RERANK)
    assert not (tmp_path / "c.jsonl").exists()


def test_what_is_no_ledger_of_the_same_scorer_is_refused(parts: list[Path], tmp_path: Path) -> None:
    open_ledger(tmp_path / "c.jsonl", replace(IDENTITY, numbers="bfloat16 on cpu")).close()
    with pytest.raises(UsageError, match=r"c\.jsonl holds answers of another run: numbers is") as caught:
        read_ledgers([*parts, tmp_path / "c.jsonl"], Task.RERANK)
    assert caught.value.hint == "Verify that shard again."
    for content in ("", "torn header", "notes\n", "[]\n"):
        (tmp_path / "notes").write_text(content)
        with pytest.raises(UsageError, match="notes is not a ledger"):
            read_ledgers([tmp_path / "notes", *parts], Task.RERANK)
        with pytest.raises(UsageError, match="notes is not a ledger"):
            read_ledgers([*parts, tmp_path / "notes"], Task.RERANK)


def test_a_broken_line_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes() + b"{}\n")
    with pytest.raises(UsageError, match=r"b\.jsonl, line 4 is not an answer: it has no key"):
        read_ledgers(parts, Task.RERANK)


def test_a_target_that_cannot_be_written_is_named(parts: list[Path]) -> None:
    with pytest.raises(SetupError, match=r"whole\.jsonl cannot be written: "):
        copy_ledgers(parts, parts[0] / "whole.jsonl")
