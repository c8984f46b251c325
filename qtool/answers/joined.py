"""Several ledgers of one scorer as one, and a scorer that knows only what stands in it.

Rule: nothing is asked; an answer that no ledger holds is an error that names the question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qtool.answers.ledger import open_ledger
from qtool.answers.remembering import Remembering
from qtool.errors import UsageError
from qtool.scoring.scorer import Identity, unheard

if TYPE_CHECKING:
    from qtool.arch.spec import Task
    from qtool.inputs.items import Item, Pair
    from qtool.scoring.scorer import Answered, PromptSeen


def join_ledgers(parts: Sequence[Path], target: Path, task: Task) -> Remembering:
    """Copy the answers of `parts` into a new ledger at `target`; all must be of one identity."""
    identity = _identity(parts[0])
    for part in parts:
        open_ledger(part, identity).close()  # raises where it is another's or broken
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as joined:
        for number, part in enumerate(parts):
            header, _, answers = part.read_bytes().partition(b"\n")
            joined.write(answers if number else header + b"\n" + answers)
    return Remembering(_Silent(identity, task), open_ledger(target, identity))


def _identity(path: Path) -> Identity:
    try:
        with path.open("rb") as file:
            return Identity(**json.loads(file.readline())["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no ledger of answers.") from error


class _Silent:
    """A scorer without a model."""

    family = None
    query_instruction = None

    def __init__(self, identity: Identity, task: Task) -> None:
        self.identity = identity
        self.task = task

    def score(self, pairs: Sequence[Pair], answered: Answered = unheard) -> NoReturn:
        del answered
        raise UsageError(f"No run has answered {pairs[0].name}, nor {len(pairs) - 1} more pairs.")

    def embed(self, items: Sequence[Item], answered: Answered = unheard) -> NoReturn:
        del answered
        raise UsageError(f"No run has answered item {items[0].id!r}, nor {len(items) - 1} more items.")

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        del question
        return None

    def close(self) -> None:
        """There is nothing to free."""
