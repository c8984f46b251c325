"""Whether two tokenizer.json cut every text into the same tokens.

Rule: what differs is named by what it does to a text; the order of keys and the spelling of merges say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.comparison.catalogue import finding
from qtool.inspection.catalogue import listed_are
from qtool.inspection.finding import Finding

_RULES: Final = ("normalizer", "pre_tokenizer", "post_processor")
_MARKS: Final = ("special", "lstrip", "rstrip", "normalized", "single_word")


def tokenizer_findings(target: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What keeps `found` from giving the ids that `expected` gives."""
    words, wanted = _vocabulary(found), _vocabulary(expected)
    problem = vocabulary_problem(list(words.items()), list(wanted.items())) or _merge_problem(found, expected)
    if problem:
        yield finding("other-tokenizer", target, problem=problem)
        return
    added, needed = _added(found), _added(expected)
    lost = [token for token, marks in needed.items() if added.get(token, {}).get("id") != marks["id"]]
    if lost:
        yield finding("added-token-missing", target, tokens=listed_are(lost))
        return
    parts = [part for part in _RULES if found.get(part) != expected.get(part)]
    for part in parts or (["added_tokens"] if added != needed else []):
        yield finding("other-tokenizer-rules", target, part=part)


def vocabulary_problem(found: list[Any], expected: list[Any]) -> str:
    """How two vocabularies differ, or nothing; entries are compared as a whole."""
    if found == expected:
        return ""
    known = {str(entry) for entry in found}
    missing = [entry for entry in expected if str(entry) not in known]
    if not missing and len(found) == len(expected):
        missing = [e for f, e in zip(found, expected, strict=True) if f != e]
    example = str(missing[0]) if missing else "none of the reference's is missing"
    return f"{len(missing):,} of {len(expected):,} tokens differ, such as {example}"


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return dict(sorted(vocabulary.items(), key=lambda entry: str(entry[1])))


def _merge_problem(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    mine, theirs = _merges(found), _merges(expected)
    return "" if mine == theirs else f"it merges other letters ({len(mine):,} rules, the reference has {len(theirs):,})"


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    merges = tokenizer.get("model", {}).get("merges", [])
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _added(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens by their text."""
    added = tokenizer.get("added_tokens") or []
    return {each["content"]: {"id": each["id"], **{mark: each.get(mark) for mark in _MARKS}} for each in added}
