"""One thing that an inspection has to say.

Rule: a code to look up, one sentence to read, and where there is one the command that mends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

_LONGEST: Final = 200


class Severity(str, Enum):
    """`broken` gives wrong answers or none, `warning` may, `note` is worth knowing."""

    BROKEN = "broken"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """`remedy` is a command, empty where there is nothing to mend."""

    code: str
    severity: Severity
    sentence: str
    remedy: str = ""


def printable(text: str, longest: int = _LONGEST) -> str:
    """What a stranger's file says, short, and without what a terminal would obey or an encoder refuse."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
