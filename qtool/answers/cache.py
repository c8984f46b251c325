"""Answers kept from one run to the next, in the user's cache.

Rule: only those of a pinned identity: what a server answers today, it may not answer tomorrow.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.answers.ledger import open_ledger
from qtool.answers.remembering import Remembering
from qtool.errors import SetupError

if TYPE_CHECKING:
    from qtool.scoring.scorer import Identity, Scorer


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
        return Remembering(scorer, open_ledger(cached_answers(scorer.identity), scorer.identity, is_shared=True))
    except SetupError:
        return scorer
