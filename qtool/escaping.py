"""Text as it may be shown: without secrets, without what a terminal would obey or a reader would not see, and not endless.

`shown` is the one boundary: errors, the console, the log and the writers of reports pass their text through it.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

from qtool.redaction import map_texts, redacted

LONGEST_NAME: Final = 200
"""Characters of a name, such as a tensor's, in a sentence."""
LONGEST_LINE: Final = 4000
"""Characters of one line that reaches a terminal, a log or an error."""
LONGEST_IN_REPORT: Final = 100_000
"""Of one text of a report; a small picture as a `data:` URL is shorter."""
_SPACES: Final = "\u00a0\u3000"
"""Spaces of French and Chinese texts, which str.isprintable refuses."""
_UNPRINTABLE: Final = re.compile(r"[^ -~]")


def printable(text: str, longest: int = LONGEST_NAME, keep: str = "") -> str:
    """`text` shortened, with an escape for each control character, bidi override, surrogate and invisible character.

    `keep` are characters, such as a newline, that stay.
    """
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), short)


def _escaped(character: str) -> str:
    if character.isprintable() or character in _SPACES:
        return character
    return character.encode("unicode_escape").decode()


def shown(text: str, longest: int = LONGEST_LINE) -> str:
    """One line that may be shown."""
    return printable(redacted(text), longest)


def shown_lines(text: str, longest: int = LONGEST_LINE) -> str:
    """Several lines that may be shown, each shortened by itself; in all a hundred times `longest`."""
    lines = (printable(line.removesuffix("\r"), longest, keep="\t") for line in redacted(text).split("\n"))
    return printable("\n".join(lines), 100 * longest, keep="\n\t")


T = TypeVar("T")


def reportable(value: T) -> T:
    """`value` with every text in it as a report may hold it; line ends stay."""
    changed: T = map_texts(redacted(value), lambda text: printable(text, LONGEST_IN_REPORT, keep="\n\t"))
    return changed


def json_escaped(text: str) -> str:
    """JSON with a JSON escape for each invisible character: the same value, safe to show and to encode."""
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in "\n\t\r" else _json_escape(match[0]), text)


def _json_escape(character: str) -> str:
    if character.isprintable() or character in _SPACES:
        return character
    code = ord(character)
    if code > 0xFFFF:
        high, low = divmod(code - 0x10000, 0x400)
        return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
    return f"\\u{code:04x}"
