"""Take sections out of unpacked packages: `python -m tools.calibration.gather SOURCE FOLDER`, SOURCE of `sources.yaml`.

It wrote the JSON Lines files in `texts`, which are kept: a later release of a package has other sections. Sections are
chosen by hashes of their place, so that each language is spread over its whole source.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

from typing_extensions import override

from tools.calibration.sources import TEXTS

SHORTEST, LONGEST = 240, 1300
SHORTEST_MESSAGE = 40
"""Characters of a section; Chinese, Japanese and Korean ones are half as long."""
_DENSE: Final = ("ja", "ko", "zh")
_SPACES: Final = re.compile(r"\s+")
_END: Final = re.compile(r"[.!?\u0964](?=\s|$)|[\u3002\uff01\uff1f]")


@dataclass(frozen=True)
class Section:
    """A section of a document; `place` is the file in its package."""

    language: str
    title: str
    text: str
    place: str


def gather(sections: Iterator[Section], quota: dict[str, int], shortest: int = SHORTEST) -> list[Section]:
    """Sections of usable length, up to `quota` characters of each language, in the order of their places."""
    fitting = {
        (section.title, section.text): section for section in map(_cut, sections) if _is_usable(section, shortest)
    }
    chosen: list[Section] = []
    taken = dict.fromkeys(quota, 0)
    for section in sorted(fitting.values(), key=_lot):
        if taken.get(section.language, 0) < quota.get(section.language, 0):
            taken[section.language] += len(section.text)
            chosen.append(section)
    return sorted(chosen, key=lambda section: (section.language, section.place, section.title))


def _lot(section: Section) -> str:
    return hashlib.sha256(f"{section.place}/{section.title}".encode()).hexdigest()


def _cut(section: Section) -> Section:
    """The section up to its last sentence within the length."""
    longest = LONGEST // 2 if section.language in _DENSE else LONGEST
    text = section.text[:longest]
    if len(section.text) > longest:
        ends = [match.end() for match in _END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    return Section(section.language, section.title, text.strip(), section.place)


def _is_usable(section: Section, shortest: int) -> bool:
    needed = shortest // 2 if section.language in _DENSE else shortest
    return len(section.text) >= needed and 3 <= len(section.title) <= 120 and section.text.count(" | ") < 3


# Formats of documentation: HTML pages, reStructuredText, man pages and catalogues of translated messages.


class _Page(HTMLParser):
    """Headings of an HTML page with the paragraphs below each."""

    def __init__(self) -> None:
        super().__init__()
        self.language = ""
        self.sections: list[tuple[str, list[str]]] = []
        self._kind = ""
        self._parts: list[str] = []
        self._skipped = 0
        self._has_ended = False

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "html":
            self.language = named.get("lang") or ""
        if named.get("class") == "bottomlang" or named.get("id") == "footer":
            self._close()
            self._has_ended = True
        if tag in ("script", "style", "table", "form") or named.get("class") in ("permalink", "seealso", "toplang"):
            self._skipped += tag not in ("a", "p") or named.get("class") == "permalink"
        if tag in ("h1", "h2", "h3", "p", "pre"):
            self._close()
            self._kind = tag

    @override
    def handle_endtag(self, tag: str) -> None:
        if self._skipped and tag in ("script", "style", "table", "form", "a", "ul", "div"):
            self._skipped -= 1
        elif tag in ("h1", "h2", "h3", "p", "pre"):
            self._close()

    @override
    def handle_data(self, data: str) -> None:
        if self._kind and not self._skipped and not self._has_ended:
            self._parts.append(data)

    def _close(self) -> None:
        text = "".join(self._parts)
        text = text.strip("\n") if self._kind == "pre" else _SPACES.sub(" ", text).strip()
        if text and self._kind.startswith("h"):
            self.sections.append((text, []))
        elif text and self.sections:
            self.sections[-1][1].append(text)
        self._kind, self._parts = "", []


def html_sections(folder: Path) -> Iterator[Section]:
    """Sections of the pages in the sub-folders of `folder`, which are languages; a page in another one is left out."""
    for path in sorted(folder.glob("*/**/*.html")):
        relative = path.relative_to(folder)
        page = _Page()
        content = path.read_bytes()
        found = re.search(rb"charset=([\w-]+)", content)
        page.feed(content.decode(found[1].decode() if found else "utf-8", "replace"))
        language = page.language.partition("-")[0]
        for title, paragraphs in page.sections if page.language == relative.parts[0] else ():
            text = "\n".join(paragraphs)
            if language == "en" or not _is_english(text):
                yield Section(language, title, text, relative.as_posix())


def _is_english(text: str) -> bool:
    """Whether a section was left untranslated, by its commonest words."""
    words = text.lower().split()
    return sum(word in ("the", "of", "and", "is", "to") for word in words) * 16 > len(words)


def rst_sections(folder: Path) -> Iterator[Section]:
    """Sections of the reStructuredText files below `folder`."""
    for path in sorted(folder.glob("**/*.txt")):
        content = path.read_text(encoding="utf-8")
        parts = re.split(r"^(?:([=\-~])\1{2,}\n)?(\S.*)\n([=\-~])\3{2,}\n", content, flags=re.MULTILINE)
        for title, body in zip(parts[2::4], parts[4::4], strict=True):
            yield Section("en", _plain_rst(title), _plain_rst(body), path.relative_to(folder).as_posix())


def _plain_rst(text: str) -> str:
    text = re.sub(r"^\.\. (?!code-block).*(\n[ ]+.*)*\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. code-block::.*\n(\s+:.*\n)*", "", text, flags=re.MULTILINE)
    text = re.sub(r":[\w:-]+:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*(?:<[^`]*>)?`__?", r"\1", text.replace("``", ""))
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", text.replace("::\n", ":\n"))
    return re.sub(r"\n{2,}", "\n", text).strip()


def man_sections(folder: Path) -> Iterator[Section]:
    """The description in each man page of `folder`, under what its NAME says."""
    for path in sorted(folder.glob("*.gz")):
        source = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        parts = re.split(r'^\.SH "?([^"\n]*)"?\n', source, flags=re.MULTILINE)
        found = dict(zip(parts[1::2], map(_plain_roff, parts[2::2]), strict=True))
        if "NAME" in found and "DESCRIPTION" in found:
            yield Section("en", found["NAME"].replace("_", " "), found["DESCRIPTION"], path.name)


def _plain_roff(text: str) -> str:
    text = re.sub(
        r'^(\.\\"|\.(sp|nf|fi|RS|RE|if|ie|el|br|TP|IP|ad|nh|\}|\.).*|\.$|\.PP).*\n', "\n", text, flags=re.MULTILINE
    )
    text = re.sub(r"^\.\w+ ?(.*)$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\\f[A-Z]|\\&|\\,|\\/|\\[|^]", "", text.replace("\\*(Aq", "'").replace("\\(aq", "'"))
    text = (
        text.replace("\\ ", " ")
        .replace("\\-", "-")
        .replace("\\(lq", '"')
        .replace("\\(rq", '"')
        .replace("\\(em", " - ")
        .replace("\\e", "\\")
    )
    return re.sub(r"\n{2,}", "\n", re.sub(r"(?<=\S)\n(?=\S)", " ", text)).strip()


def message_sections(folder: Path) -> Iterator[Section]:
    """Longer messages of a program, in English as title and translated as text."""
    for path in sorted(folder.glob("**/locale/*/LC_MESSAGES/django.mo")):
        language, _, variant = path.parts[-3].partition("_")
        if variant not in ("", "BR", "Hans"):
            continue
        with path.open("rb") as file:
            # Its own look-up needs to know the messages.
            catalogue: dict[object, object] = vars(gettext.GNUTranslations(file))["_catalog"]
        messages = {key: text for key, text in catalogue.items() if isinstance(key, str) and isinstance(text, str)}
        for message, text in sorted(messages.items()):
            if len(message) >= SHORTEST_MESSAGE and text != message:
                yield Section(language, _plain(message), _plain(text), path.relative_to(folder).as_posix())


def _plain(text: str) -> str:
    return _SPACES.sub(" ", re.sub(r"<[^>]*>", "", text)).strip()


@dataclass(frozen=True)
class _Reader:
    read: Callable[[Path], Iterator[Section]]
    quota: dict[str, int]
    shortest: int = SHORTEST


READERS: Final = {
    "httpd": _Reader(
        html_sections,
        {
            "en": 60_000, "de": 42_000, "fr": 42_000, "es": 42_000, "pt": 12_000, "tr": 20_000, "da": 8_000, "ru": 12_000,
            "ja": 18_000, "ko": 18_000, "zh": 14_000,
        },
    ),
    "django": _Reader(rst_sections, {"en": 40_000}),
    "django-messages": _Reader(
        message_sections, {"ar": 2_200, "hi": 2_200, "it": 2_200, "pt": 2_200, "ru": 2_200, "zh": 1_000}, SHORTEST_MESSAGE
    ),
    "postgresql": _Reader(man_sections, {"en": 24_000}),
}  # fmt: skip
"""By source: what reads its files, and how many characters of each language are taken."""


def main() -> None:
    """Parse the command line, gather and write."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibration.gather", description=__doc__)
    parser.add_argument("source", choices=READERS)
    parser.add_argument("folder", type=Path, help="where the package's documents lie")
    options = parser.parse_args()
    reader = READERS[options.source]
    sections = gather(reader.read(options.folder), reader.quota, reader.shortest)
    lines = "".join(json.dumps(asdict(section), ensure_ascii=False) + "\n" for section in sections)
    (TEXTS / f"{options.source}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{options.source}: {len(sections)} sections, {len(lines.encode()):,} bytes")


if __name__ == "__main__":
    main()
