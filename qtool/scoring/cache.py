"""The cache: answers kept from one run to the next, in the user's folder.

Only of a pinned identity and to questions whose content is pinned too: a server's answers, or what lies at an address,
may be others tomorrow. A cache that cannot be read or written ends no run: it is logged once, and the models are asked.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from typing_extensions import override

import qtool
from qtool.errors import QtoolError, SetupError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.ledger import Answer, AnswerStore, Ledger, answer_line, open_ledger, read_answer
from qtool.scoring.question_keys import names_content
from qtool.scoring.scorer import Identity

_BROKEN: Final = ".broken"

log = logging.getLogger("qtool.scoring")


class AnswersInMemory(AnswerStore):
    """Answers that are kept as long as this process runs."""

    def __init__(self) -> None:
        self._known: dict[str, Answer] = {}

    @override
    def __contains__(self, key: str) -> bool:
        return key in self._known

    @override
    def __getitem__(self, key: str) -> Answer:
        return self._known[key]

    @override
    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        self._known[key] = read_answer(answer_line(key, question, answer))[1]  # as a ledger would return it

    @override
    def close(self) -> None:
        """Keep them: others of this process will ask again."""


def cache_folder() -> Path:
    """`$QTOOL_CACHE`, or `qtool` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("QTOOL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool"


def cached_answers(identity: Identity) -> Path:
    """The ledger of `identity` in the cache, of this version of qtool: another may read the same picture differently."""
    return cache_folder() / "answers" / qtool.__version__ / f"{identity.key}.jsonl"


def open_cache(identity: Identity) -> AnswerStore | None:
    """The cached answers of `identity`; None where it is not pinned or the cache cannot be written."""
    if not identity.is_pinned:
        return None
    try:
        return _Cache(_open_cache_ledger(identity))
    except (QtoolError, OSError) as error:
        log.warning("Answers are not cached: %s", error)
        return None


def _open_cache_ledger(identity: Identity) -> Ledger:
    path = cached_answers(identity)
    try:
        return open_ledger(path, identity, is_shared=True)
    except UsageError as error:
        log.warning(
            "%s The cache of these answers starts over; the old file is renamed to *%s.", error.message, _BROKEN
        )
    with suppress(FileNotFoundError):  # another run has renamed it
        path.replace(path.with_name(path.name + _BROKEN))
    return open_ledger(path, identity, is_shared=True)


class _Cache(AnswerStore):
    """A ledger that keeps in memory what must not be kept longer, and everything once the disk refuses a line."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._in_memory: dict[str, Answer] = {}
        self._is_full = False

    @override
    def __contains__(self, key: str) -> bool:
        return key in self._in_memory or key in self._ledger

    @override
    def __getitem__(self, key: str) -> Answer:
        return self._in_memory[key] if key in self._in_memory else self._ledger[key]

    @override
    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        if names_content(question) and not self._is_full:
            try:
                self._ledger.write(key, question, answer)
            except SetupError as error:
                log.warning("%s From here on, answers are not cached.", error.message)
                self._is_full = True
            else:
                return
        self._in_memory[key] = read_answer(answer_line(key, question, answer))[1]  # as the ledger would return it

    @override
    def close(self) -> None:
        with suppress(SetupError):
            self._ledger.close()
