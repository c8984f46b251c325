"""Several ledgers of one scorer as one, and a scorer that knows only what stands in them.

Rule: nothing is asked, and nothing is written into the parts, which may lie where nobody may write; an answer that no
ledger holds is an error that names the question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qtool.answers.ledger import Ledger
from qtool.answers.lines import Answer, read_answer, read_header
from qtool.answers.remembering import Remembering
from qtool.answers.write_errors import named_write_errors
from qtool.errors import SetupError, UsageError
from qtool.scoring.scorer import Identity, unheard

if TYPE_CHECKING:
    from qtool.arch.spec import Task
    from qtool.inputs.items import Item, Pair
    from qtool.scoring.scorer import Answered, PromptSeen

_NO_FILE = -1


class UnansweredError(UsageError):
    """No ledger holds the answers to `count` questions, the first of which is called `name`."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"No run has answered {name}{f', nor {count - 1} more' if count > 1 else ''}.")


def read_ledgers(parts: Sequence[Path], task: Task) -> Remembering:
    """All answers of `parts`, which must be of one identity. Raises UsageError on one that is another's or broken."""
    identity = _identity(parts[0])
    known = dict(answer for part in parts for answer in _answers(part, identity))
    return Remembering(_Silent(identity, task), Ledger(parts[0], _NO_FILE, known, is_shared=False))


def copy_ledgers(parts: Sequence[Path], target: Path) -> None:
    """Write the answers of `parts`, which `read_ledgers` took, as one ledger. Raises SetupError."""
    with named_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as joined:
            for number, part in enumerate(parts):
                joined.writelines(islice(_whole_lines(part), 1 if number else 0, None))  # one header is enough


def _answers(part: Path, identity: Identity) -> Iterator[tuple[str, Answer]]:
    lines = _whole_lines(part)
    try:
        read_header(next(lines, b""), identity, part)
    except UsageError as error:  # whose hint is for who writes a ledger
        raise UsageError(error.message, "Verify that shard again.") from error
    yield from (_answer(part, number, line) for number, line in enumerate(lines, start=2))


def _answer(part: Path, number: int, line: bytes) -> tuple[str, Answer]:
    try:
        return read_answer(line)
    except ValueError as error:
        raise UsageError(f"{part}, line {number} is no answer: {error}.", "Verify that shard again.") from error


def _identity(path: Path) -> Identity:
    try:
        return Identity(**json.loads(next(_whole_lines(path), b""))["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no ledger of answers.") from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a ledger without what a killed run tore off at the end."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}.") from error


class _Silent:
    """A scorer without a model."""

    family = None
    query_instruction = None
    dimensions = None

    def __init__(self, identity: Identity, task: Task) -> None:
        self.identity = identity
        self.task = task

    def score(self, pairs: Sequence[Pair], answered: Answered = unheard) -> NoReturn:
        del answered
        raise UnansweredError(pairs[0].name, len(pairs))

    def embed(self, items: Sequence[Item], answered: Answered = unheard) -> NoReturn:
        del answered
        raise UnansweredError(f"item {items[0].id!r}", len(items))

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        del question
        return None

    def close(self) -> None:
        """There is nothing to free."""
