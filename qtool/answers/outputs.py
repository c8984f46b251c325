"""Files of answers that a killed run leaves to be gone on with.

Rule: a file appears under its name when it is complete; until then its answers stand in the ledger `NAME.partial`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.answers.ledger import open_ledger
from qtool.answers.remembering import Remembering
from qtool.answers.write_errors import named_write_errors
from qtool.errors import SetupError, UsageError

if TYPE_CHECKING:
    from qtool.scoring.scorer import Scorer

_PARTIAL: Final = ".partial"
_NEW: Final = ".new"


def check_output(output: Path, beginning: bytes, *, force: bool) -> None:
    """Raise UsageError where it exists, and with `force` where it does not begin as what is to be written there does."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", "Name a file.")
    if not force and (output.exists() or output.is_symlink()):
        raise UsageError(f"{output} exists.", "Choose another --output, or pass --force to replace it.")
    if output.exists() and not _begins(output, beginning):
        raise UsageError(f"{output} was not written by this command.", "Choose another --output.")


def _begins(file: Path, beginning: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(beginning)) in (beginning, b"")
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}.") from error


@contextmanager
def resumable(scorer: Scorer, output: Path | None, *, force: bool) -> Iterator[Scorer]:
    """`scorer`, remembering what an interrupted run for `output` was answered; closed afterwards.

    What it has answered is forgotten when the block, in which the output is written, ends well.
    """
    with closing(scorer):
        if output is None:
            yield scorer
            return
        partial = output.with_name(output.name + _PARTIAL)
        with open_ledger(partial, scorer.identity, anew=force) as ledger:
            yield Remembering(scorer, ledger)
            partial.unlink()


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield a path to write; the file takes `output`'s place when the block ends well."""
    written = output.with_name(output.name + _NEW)
    try:
        with named_write_errors(output):
            yield written
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(output)
    finally:
        written.unlink(missing_ok=True)
