"""A ledger: a JSON Lines file of one scorer's answers, each on the disk as soon as it is known.

Rule: a line is whole or it is not there. What a killed run tore off at the end is dropped; anything else that is no
answer is an error that names the line, and answers of another identity are refused.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.answers.lines import Answer, answer_line, header_line, read_answer, read_header
from qtool.answers.write_errors import named_write_errors
from qtool.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

    from qtool.inputs.items import Item, Pair
    from qtool.scoring.scorer import Identity

_SYNC_SECONDS: Final = 5.0
_BLOCK: Final = 1 << 16


class Ledger:
    """Answers by the key of their question; see `open_ledger`."""

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

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Answer:
        return self._known[key]

    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Remember an answer, past this process's death. Raises SetupError where the disk does not take it."""
        line = answer_line(key, question, answer)
        with named_write_errors(self.path), self._alone():
            _write(self._descriptor, line)
            self._sync()
        self._known[key] = read_answer(line)[1]

    def close(self) -> None:
        """Let go of the file. Raises SetupError where the disk does not take what was written."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        with named_write_errors(self.path):
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._is_shared:  # the lock is held since the file was opened
            yield
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            _drop_torn(self._descriptor)  # of another process that was killed
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _sync(self) -> None:
        # The kernel has the line in any case; this is for a machine that dies.
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()


def open_ledger(path: Path, identity: Identity, *, is_shared: bool = False, anew: bool = False) -> Ledger:
    """Open or begin the ledger of `identity` at `path`; `anew` drops what it holds.

    It is one process's until closed, or with `is_shared` locked for each line only, so that several add to it.
    Raises UsageError on a ledger that is another's, broken or in use, SetupError where the disk does not take it.
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
    _drop_torn(descriptor)  # not before it is known to be a ledger
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        file.readline()
        return dict(_checked(path, number, line) for number, line in enumerate(file, start=2))


def _begin(descriptor: int, path: Path, header: bytes) -> None:
    """Write the header into an empty file, or one whose header was torn."""
    start = os.pread(descriptor, len(header), 0)
    if b"\n" in start or len(start) == len(header):
        return
    if not header.startswith(start):
        raise UsageError(f"{path} is no ledger of answers.", "Choose another output.")
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


def _checked(path: Path, number: int, line: bytes) -> tuple[str, Answer]:
    try:
        return read_answer(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number} is no answer: {error}.", "Delete that line, or the file.") from error
