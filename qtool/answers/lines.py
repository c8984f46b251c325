"""The lines of a ledger: a header that says whose answers these are, then one answer a line.

Rule: numbers come back as they were: log-odds as Python writes a float, vectors as the base64 of their float32 bytes.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair

if TYPE_CHECKING:
    from qtool.scoring.scorer import Identity

SCHEMA_VERSION: Final = 1
_MARK: Final = "qtool_answers"
_BEGINNING: Final = f'{{"{_MARK}": '.encode()
_SHOWN: Final = 16

Answer: TypeAlias = float | NDArray[np.float32]
"""Log-odds of a pair, or the vector of an item."""


def header_line(identity: Identity) -> bytes:
    """The first line of a ledger of `identity`, newline included."""
    return _line({_MARK: SCHEMA_VERSION, "qtool": version("qtool"), "identity": asdict(identity)})


def read_header(line: bytes, identity: Identity, path: Path) -> None:
    """Raise UsageError unless `line` begins a ledger of `identity`, saying which field differs."""
    header = _object(line)
    if header.get(_MARK) is None or not isinstance(header.get("identity"), dict):
        raise UsageError(f"{path} is no ledger of answers.", "Choose another output.")
    theirs: dict[str, Any] = {_MARK: header[_MARK], "qtool": header.get("qtool"), **header["identity"]}
    ours = {_MARK: SCHEMA_VERSION, "qtool": version("qtool"), **asdict(identity)}
    for name in (_MARK, "qtool", *(field.name for field in fields(identity))):
        if theirs.get(name) != ours[name]:
            raise UsageError(
                f"{path} holds answers of another run: its {name} is {_shown(theirs.get(name))}, "
                f"this one's is {_shown(ours[name])}.",
                "Choose another output, or begin anew with --force.",
            )


def may_be_ledger(path: Path) -> bool:
    """Whether a file begins as a ledger does, of whatever identity; one whose header was torn off may be one too."""
    with path.open("rb") as file:
        start = file.read(len(_BEGINNING))
    return _BEGINNING.startswith(start)


def answer_line(key: str, question: Pair | Item, answer: Answer) -> bytes:
    """The line of an answer, newline included; the question's ids are for people, the key for the program."""
    if isinstance(question, Pair):
        ids = {"query": question.query.id, "document": question.document.id}
        return _line({"key": key, **ids, "log_odds": float(answer)})
    vector = base64.b64encode(np.ascontiguousarray(answer, dtype="<f4").tobytes()).decode()
    return _line({"key": key, "item": question.id, "vector": vector})


def read_answer(line: bytes) -> tuple[str, Answer]:
    """Key and answer of a line. Raises ValueError that says what is wrong."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is broken off, or no JSON for another reason") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - one kind of error for all that can be wrong
    key, log_odds, vector = (content.get(name) for name in ("key", "log_odds", "vector"))
    if not isinstance(key, str):
        raise ValueError("it has no key")  # noqa: TRY004 - as above
    if isinstance(log_odds, float) and math.isfinite(log_odds):
        return key, log_odds
    if isinstance(vector, str):
        return key, np.frombuffer(base64.b64decode(vector, validate=True), dtype="<f4").astype(np.float32, copy=False)
    raise ValueError("it has neither finite log-odds nor a vector")


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _shown(value: object) -> str:
    return f"{value[:_SHOWN]}…" if isinstance(value, str) and len(value) > 4 * _SHOWN - 1 else repr(value)
