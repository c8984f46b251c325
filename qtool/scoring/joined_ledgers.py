"""Several ledgers of one identity joined, for a scorer without a model.

The files are only read, since they may lie where nothing can be written; a question that none of them answers is an
error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from typing_extensions import override

from qtool.errors import SetupError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.progress import ignore
from qtool.scoring.ledger import Answer, Ledger, numbered_answer, read_header
from qtool.scoring.remembering import Remembering
from qtool.scoring.scorer import Answered, Identity, PromptSeen, Scorer
from qtool.storage.atomic import named_write_errors

if TYPE_CHECKING:
    from qtool.arch.spec import Task

_CLOSED: Final = -1
_AGAIN: Final = "Verify that shard again."


class UnansweredError(UsageError):
    """No ledger holds the answers to `count` questions, the first of which is called `name`."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"No run has answered {name}{f', nor {count - 1} more' if count > 1 else ''}.")


def read_ledgers(parts: Sequence[Path], task: Task) -> Remembering:
    """All answers of `parts`, which must be of one identity. Raises UsageError on a part of another, or a broken one."""
    identity = _identity(parts[0])
    known = dict(answer for part in parts for answer in _read_answers(part, identity))
    return Remembering(_NoModel(identity, task), [Ledger(parts[0], _CLOSED, known, is_shared=False)])


def copy_ledgers(parts: Sequence[Path], target: Path) -> None:
    """Write the answers of `parts`, which `read_ledgers` took, as one ledger. Raises SetupError."""
    with named_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as joined:
            for number, part in enumerate(parts):
                joined.writelines(islice(_whole_lines(part), 1 if number else 0, None))  # one header is enough


def _read_answers(part: Path, identity: Identity) -> Iterator[tuple[str, Answer]]:
    lines = _whole_lines(part)
    try:
        read_header(next(lines, b""), identity, part)
    except UsageError as error:  # its hint is for a run that writes the ledger
        raise UsageError(error.message, _AGAIN) from error
    yield from (numbered_answer(part, number, line, _AGAIN) for number, line in enumerate(lines, start=2))


def _identity(path: Path) -> Identity:
    try:
        return Identity(**json.loads(next(_whole_lines(path), b""))["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a ledger of answers.", _AGAIN) from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a ledger without what a killed run cut off at the end."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}.") from error


class _NoModel(Scorer):
    """A scorer that has no answer to anything."""

    family = None
    query_instruction = None
    dimensions = None

    def __init__(self, identity: Identity, task: Task) -> None:
        self._identity = identity
        self._task = task

    @property
    @override
    def task(self) -> Task:
        return self._task

    @property
    @override
    def identity(self) -> Identity:
        return self._identity

    @override
    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> NoReturn:
        raise UnansweredError(pairs[0].name, len(pairs))

    @override
    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NoReturn:
        raise UnansweredError(f"item {items[0].id!r}", len(items))

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        return None

    @override
    def close(self) -> None:
        pass
