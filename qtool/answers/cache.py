"""Answers kept from one run to the next, in the user's cache.

Rule: only those of a pinned identity, to questions whose content is pinned too: what a server answers today, or shows at
an address, it may not tomorrow. And no run ends for the cache's sake: what cannot be read or written is said once, and
the models are asked.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.answers.keys import names_content
from qtool.answers.ledger import Ledger, open_ledger
from qtool.answers.lines import Answer, answer_line, read_answer
from qtool.answers.remembering import Remembering
from qtool.errors import QtoolError, SetupError, UsageError

if TYPE_CHECKING:
    from qtool.inputs.items import Item, Pair
    from qtool.scoring.scorer import Identity, Scorer


_BROKEN: Final = ".broken"

log = logging.getLogger("qtool.answers")


def cache_folder() -> Path:
    """`$QTOOL_CACHE`, or `qtool` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("QTOOL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool"


def cached_answers(identity: Identity) -> Path:
    """The ledger of `identity` in the cache; another version of qtool, which may read a picture otherwise, has another."""
    return cache_folder() / "answers" / version("qtool") / f"{identity.key}.jsonl"


def cached(scorer: Scorer) -> Scorer:
    """`scorer` with its answers in the cache; itself where it is not pinned or the cache cannot be written."""
    if not scorer.identity.is_pinned:
        return scorer
    try:
        return Remembering(scorer, _CacheLedger(_opened(scorer.identity)))
    except (QtoolError, OSError) as error:
        log.warning("Answers are not cached: %s", error)
        return scorer


def _opened(identity: Identity) -> Ledger:
    path = cached_answers(identity)
    try:
        return open_ledger(path, identity, is_shared=True)
    except UsageError as error:
        log.warning("%s The cache of these answers begins anew; the file is now called *%s.", error.message, _BROKEN)
    with suppress(FileNotFoundError):  # another run has set it aside
        path.replace(path.with_name(path.name + _BROKEN))
    return open_ledger(path, identity, is_shared=True)


class _CacheLedger:
    """A ledger that goes on in memory where the disk takes no more, and for what is not to be kept."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._unkept: dict[str, Answer] = {}
        self._is_full = False

    def __contains__(self, key: str) -> bool:
        return key in self._unkept or key in self._ledger

    def __getitem__(self, key: str) -> Answer:
        return self._unkept[key] if key in self._unkept else self._ledger[key]

    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Remember an answer, on the disk if it may be kept and until that fails once."""
        if not (names_content(question) and self._is_kept(key, question, answer)):
            self._unkept[key] = read_answer(answer_line(key, question, answer))[1]  # as the ledger would give it back

    def _is_kept(self, key: str, question: Pair | Item, answer: Answer) -> bool:
        if self._is_full:
            return False
        try:
            self._ledger.write(key, question, answer)
        except SetupError as error:
            log.warning("%s From here on, answers are not cached.", error.message)
            self._is_full = True
        return not self._is_full

    def close(self) -> None:
        """Let go of the file."""
        with suppress(SetupError):
            self._ledger.close()
