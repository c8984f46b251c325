from __future__ import annotations

import json
import math
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qtool.errors import SetupError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.ledger import answer_line, open_ledger, read_answer
from qtool.scoring.question_keys import QuestionKeys
from qtool.scoring.scorer import Identity

IDENTITY = Identity("engine 1", "a" * 64, "b" * 64, "float32 on cpu")
PAIR = Pair(Item("q", ("which?",)), Item("d", ("this",)))


def key_of(question: Pair | Item) -> str:
    return QuestionKeys().key(question)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with three answers."""
    with open_ledger(tmp_path / "l.jsonl", IDENTITY) as ledger:
        for name, value in (("a", 0.1), ("b", -1e-300), ("c", 2.0)):
            ledger.write(name, PAIR, value)
    return tmp_path / "l.jsonl"


def answers(path: Path) -> dict[str, object]:
    with open_ledger(path, IDENTITY) as ledger:
        return {name: ledger[name] for name in "abcd" if name in ledger}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_log_odds_come_back_to_the_last_bit(value: float) -> None:
    key, back = read_answer(answer_line("k", PAIR, value))
    assert (key, struct.pack("d", back)) == ("k", struct.pack("d", value))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_vectors_come_back_to_the_last_bit(values: list[float]) -> None:
    vector = np.array(values, dtype=np.float32)
    _, back = read_answer(answer_line("k", PAIR.query, vector))
    assert isinstance(back, np.ndarray)
    assert back.dtype == np.float32
    assert back.tobytes() == vector.tobytes()


def test_answers_are_there_for_the_next_run(path: Path) -> None:
    assert answers(path) == {"a": 0.1, "b": -1e-300, "c": 2.0}
    assert json.loads(path.read_text().splitlines()[1]) == {
        "key": "a", "query": "q", "document": "d", "log_odds": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_dropped_and_overwritten(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    assert answers(path) == {"a": 0.1, "b": -1e-300}
    with open_ledger(path, IDENTITY) as ledger:
        ledger.write("d", PAIR, 4.0)
    assert answers(path) == {"a": 0.1, "b": -1e-300, "d": 4.0}


def test_a_torn_line_longer_than_what_is_read_at_once_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "' + b"x" * 200_000)
    assert len(answers(path)) == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("length", [0, 1, 50])
def test_a_torn_header_begins_anew(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert answers(path) == {}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"key": "a", "log_odds": 0.', "not valid JSON, or cut off"),
        ('{"log_odds": 0.5}', "no key"),
        ('{"key": "a", "log_odds": NaN}', "neither"),
        ('{"key": "a"}', "neither"),
        ('{"key": "a", "vector": "@"}', ""),
        ('{"key": "a", "vector": "AAA="}', ""),
        ("[]", "not a JSON object"),
        ("", "not valid JSON"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(path: Path, line: str, reason: str) -> None:
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=rf"l\.jsonl, line 3 is not an answer: .*{reason}"):
        open_ledger(path, IDENTITY)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("numbers", "bfloat16 on cpu", r"numbers is 'float32 on cpu', expected 'bfloat16 on cpu'"),
        ("model", "c" * 64, r"model is a{16}…, expected c{16}…"),
        ("is_pinned", False, "is_pinned is True, expected False"),
    ],
)
def test_a_ledger_of_another_identity_is_refused_with_the_field_that_differs(
    path: Path, field: str, value: object, shown: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError, match=shown):
        open_ledger(path, replace(IDENTITY, **{field: value}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["notes", "notes\nmore", "notes\nmore\n", '{"query": "q"}\n', "{" + "x" * 999])
def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match="is not a ledger"):
        open_ledger(path, IDENTITY)
    assert path.read_text() == content


def test_one_process_writes_a_ledger_at_a_time(path: Path) -> None:
    with open_ledger(path, IDENTITY), pytest.raises(UsageError, match="Another run is writing"):
        open_ledger(path, IDENTITY)
    with open_ledger(path, IDENTITY) as ledger:
        assert len(ledger) == 3


WRITER = """
import sys
from tests.scoring.test_ledger import IDENTITY, PAIR, Path, open_ledger
with open_ledger(Path(sys.argv[1]), IDENTITY, is_shared=True) as ledger:
    for number in range(300):
        ledger.write(f"{sys.argv[2]} {number}", PAIR, float(number))
"""


def test_several_processes_add_to_a_shared_ledger(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("one", "two", "three")]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with open_ledger(path, IDENTITY) as ledger:
        assert len(ledger) == 900


def test_a_shared_ledger_mends_what_another_process_tore(path: Path) -> None:
    with open_ledger(path, IDENTITY, is_shared=True) as ledger:
        with path.open("ab") as other:
            other.write(b'{"key": "x", "log_')
        ledger.write("d", PAIR, 4.0)
    assert answers(path) == {"a": 0.1, "b": -1e-300, "c": 2.0, "d": 4.0}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file"):
        open_ledger(tmp_path / "file" / "l.jsonl", IDENTITY)


def test_a_disk_that_takes_no_more_is_named_and_what_was_written_stays(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_ledger(path, IDENTITY) as ledger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            with pytest.raises(SetupError, match=r"l\.jsonl cannot be written: File too large"):
                ledger.write("d", PAIR, 4.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answers(path) == {"a": 0.1, "b": -1e-300, "c": 2.0}


def picture(folder: Path, name: str, colour: str) -> str:
    Image.new("RGB", (32, 32), colour).save(folder / name)
    return str(folder / name)


def test_a_question_is_known_by_what_the_model_is_shown(tmp_path: Path) -> None:
    red, copy, blue = (picture(tmp_path, f"{n}.png", c) for n, c in (("r", "red"), ("c", "red"), ("b", "blue")))
    base = Pair(Item("q", ("which?",), (red,), instruction="Find."), Item("d", ("this",)))
    same = [
        replace(base, document=replace(base.document, id="other", label=3.0)),
        replace(base, document=replace(base.document, origin="query 'q1', p.jsonl, line 1")),
        replace(base, query=replace(base.query, image=(copy,))),
        replace(base, document=base.document.with_instruction("not shown")),
    ]
    different = [
        replace(base, query=replace(base.query, image=(blue,))),
        replace(base, query=replace(base.query, image=(red, red))),
        replace(base, query=base.query.with_instruction("Seek.")),
        replace(base, document=replace(base.document, text=("that",))),
        replace(base, document=replace(base.document, text=())),
        Pair(base.document, base.query),
        base.query,
        base.query.with_instruction(None),
    ]
    assert {key_of(each) for each in same} == {key_of(base)}
    assert len({key_of(each) for each in [base, *different]}) == len(different) + 1


def test_pictures_in_memory_count_by_their_pixels() -> None:
    def shown(image: Image.Image) -> str:
        return key_of(Item("i", image=(image,)))

    red = Image.new("RGB", (32, 64), "red")
    assert shown(red) == shown(red.copy()) == shown(red.convert("RGBA"))
    assert shown(red) != shown(Image.new("RGB", (64, 32), "red"))
    assert shown(red) != shown(Image.new("RGB", (32, 64), "blue"))


def test_a_picture_that_is_gone_names_its_item(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Item 'i': cannot read .*gone\.png: No such file"):
        key_of(Item("i", image=(str(tmp_path / "gone.png"),)))


def test_no_answer_is_infinite() -> None:
    with pytest.raises(ValueError, match="neither"):
        read_answer(answer_line("k", PAIR, math.inf))


def test_a_disk_that_fails_when_the_file_is_closed_is_named_and_the_file_let_go(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    ledger = open_ledger(path, IDENTITY)
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(SetupError, match=r"l\.jsonl cannot be written: Input/output error"):
        ledger.close()
    monkeypatch.undo()
    assert answers(path) == {"a": 0.1, "b": -1e-300, "c": 2.0}
