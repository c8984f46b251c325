"""Ledgers: JSON Lines files of one scorer's answers, each on the disk as soon as it is known."""

from __future__ import annotations

import base64
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

import qtool
from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair
from qtool.storage.atomic import named_write_errors

if TYPE_CHECKING:
    from typing_extensions import Self

    from qtool.scoring.scorer import Identity

# The lines of a ledger: a header with the identity that the answers depend on, then one answer a line. Numbers come back
# to the last bit: log-odds as Python writes a float, vectors as the base64 of their float32 bytes.


SCHEMA_VERSION: Final = 1
_MARK: Final = "qtool_answers"
_BEGINNING: Final = f'{{"{_MARK}": '.encode()
_SHOWN: Final = 16
_REMOVE: Final = "Delete that line, or the file."

Answer: TypeAlias = float | NDArray[np.float32]
"""Log-odds of a pair, or the vector of an item."""


def header_line(identity: Identity) -> bytes:
    """The first line of a ledger of `identity`, newline included."""
    return _line({_MARK: SCHEMA_VERSION, "qtool": qtool.__version__, "identity": asdict(identity)})


def read_header(line: bytes, identity: Identity, path: Path) -> None:
    """Raise UsageError, naming the field that differs, unless `line` begins a ledger of `identity`."""
    header = _object(line)
    if header.get(_MARK) is None or not isinstance(header.get("identity"), dict):
        raise UsageError(f"{path} is not a ledger of answers.", "Choose another output.")
    theirs: dict[str, Any] = {_MARK: header[_MARK], "qtool": header.get("qtool"), **header["identity"]}
    ours = {_MARK: SCHEMA_VERSION, "qtool": qtool.__version__, **asdict(identity)}
    for name in (_MARK, "qtool", *(field.name for field in fields(identity))):
        if theirs.get(name) != ours[name]:
            raise UsageError(
                f"{path} holds answers of another run: {name} is {_shown(theirs.get(name))}, "
                f"expected {_shown(ours[name])}.",
                "Choose another output, or start over with --force.",
            )


def may_be_ledger(path: Path) -> bool:
    """Whether a file begins as a ledger of any identity does; true of one whose header was cut off, too."""
    with path.open("rb") as file:
        start = file.read(len(_BEGINNING))
    return _BEGINNING.startswith(start)


def answer_line(key: str, question: Pair | Item, answer: Answer) -> bytes:
    """The line of an answer, newline included; programs find it by `key`, people by the question's ids."""
    if isinstance(question, Pair):
        ids = {"query": question.query.id, "document": question.document.id}
        return _line({"key": key, **ids, "log_odds": float(answer)})
    vector = base64.b64encode(np.ascontiguousarray(answer, dtype="<f4").tobytes()).decode()
    return _line({"key": key, "item": question.id, "vector": vector})


def read_answer(line: bytes) -> tuple[str, Answer]:
    """Key and answer of a line. Raises ValueError whose text is what is wrong."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON, or cut off") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - one kind of error for all that can be wrong
    key, log_odds, vector = (content.get(name) for name in ("key", "log_odds", "vector"))
    if not isinstance(key, str):
        raise ValueError("it has no key")  # noqa: TRY004 - as above
    if isinstance(log_odds, float) and math.isfinite(log_odds):
        return key, log_odds
    if isinstance(vector, str):
        return key, np.frombuffer(base64.b64decode(vector, validate=True), dtype="<f4").astype(np.float32, copy=False)
    raise ValueError("it has neither finite log-odds nor a vector")


def numbered_answer(path: Path, number: int, line: bytes, hint: str) -> tuple[str, Answer]:
    """Key and answer of line `number` of the ledger `path`. Raises UsageError with `hint`."""
    try:
        return read_answer(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number} is not an answer: {error}.", hint) from error


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


# The file. A line is written whole or dropped: what a killed run cut off at the end is removed when the ledger is opened.
# Any other line that is not an answer is an error that names it, and answers of another identity are refused.


_SYNC_SECONDS: Final = 5.0
_BLOCK: Final = 1 << 16


class AnswerStore(Protocol):
    """Answers by the key of their question."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Answer: ...

    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Keep an answer."""

    def close(self) -> None:
        """Close the file."""


class Ledger(AnswerStore):
    """The answers in one file, opened by `open_ledger`."""

    def __init__(self, path: Path, descriptor: int, known: dict[str, Answer], *, is_shared: bool) -> None:
        self.path = path
        self._descriptor = descriptor
        self._known = known
        self._is_shared = is_shared
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._known)

    @override
    def __contains__(self, key: str) -> bool:
        return key in self._known

    @override
    def __getitem__(self, key: str) -> Answer:
        return self._known[key]

    @override
    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Keep an answer, even if this process is killed next. Raises SetupError where the disk refuses it."""
        line = answer_line(key, question, answer)
        with named_write_errors(self.path), self._locked():
            _write(self._descriptor, line)
            # The kernel has the line in any case; syncing guards against a machine that stops.
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        self._known[key] = read_answer(line)[1]

    @override
    def close(self) -> None:
        """Sync and close the file. Raises SetupError where the disk refuses what was written."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        with named_write_errors(self.path):
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._is_shared:  # locked since the file was opened
            yield
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            _drop_torn(self._descriptor)  # what another process was writing when it was killed
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def open_ledger(path: Path, identity: Identity, *, is_shared: bool = False, anew: bool = False) -> Ledger:
    """Open or create the ledger of `identity` at `path`; `anew` drops what it holds.

    It stays locked until closed; with `is_shared` only while a line is written, so that several processes can add to it.
    Raises UsageError on a ledger of another identity, a broken one or one in use, SetupError where it cannot be written.
    """
    with named_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(descriptor, path, is_shared=is_shared)
            if anew:
                os.ftruncate(descriptor, 0)
            known = _read(descriptor, path, identity)
            if is_shared:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        except BaseException:
            os.close(descriptor)
            raise
    return Ledger(path, descriptor, known, is_shared=is_shared)


def _lock(descriptor: int, path: Path, *, is_shared: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if is_shared else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UsageError(f"Another run is writing {path}.", "Wait for it, or choose another output.") from None


def _read(descriptor: int, path: Path, identity: Identity) -> dict[str, Answer]:
    _begin(descriptor, path, header_line(identity))
    read_header(os.pread(descriptor, _BLOCK, 0).partition(b"\n")[0], identity, path)
    _drop_torn(descriptor)  # only now, since the file might not have been a ledger
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        file.readline()
        return dict(numbered_answer(path, number, line, _REMOVE) for number, line in enumerate(file, start=2))


def _begin(descriptor: int, path: Path, header: bytes) -> None:
    """Write the header into an empty file, or one whose header was cut off."""
    start = os.pread(descriptor, len(header), 0)
    if b"\n" in start or len(start) == len(header):
        return
    if not header.startswith(start):
        raise UsageError(f"{path} is not a ledger of answers.", "Choose another output.")
    os.ftruncate(descriptor, 0)
    _write(descriptor, header)


def _drop_torn(descriptor: int) -> None:
    """Cut off what follows the last newline."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(end - _BLOCK, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
