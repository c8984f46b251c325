"""In what two prompts differ, in words.

Rule: a known mistake is called by its name; any other is shown at the first token that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qtool.comparison.catalogue import finding
from qtool.comparison.prompt_known import KnownPrompts, Question
from qtool.inputs.items import Pair
from qtool.inspection.finding import Finding

Ids = tuple[int, ...]

_ENDS: Final = 3
"""So many tokens at an end are one's that a tokenizer adds or forgets; more are a cut."""
_AROUND: Final = 6


def difference(question: Question, found: Ids, expected: Ids, known: KnownPrompts, target: str) -> Finding:
    """What is wrong with the ids `found`."""
    name = question.name if isinstance(question, Pair) else f"item {question.id!r}"
    for code, prompt in known.wrong(question):
        if found == known.seen(question, prompt).token_ids:
            facts = {
                "found": repr(prompt.default_instruction),
                "expected": repr(known.official(question).default_instruction),
            }
            return finding(code, target, question=name, **facts)
    return (
        _at_the_ends(name, found, expected, known, target)
        or _other_instruction(name, question, found, expected, known, target)
        or _other_reading(name, question, found, expected, known, target)
    )


def _at_the_ends(name: str, found: Ids, expected: Ids, known: KnownPrompts, target: str) -> Finding | None:
    more = len(found) - len(expected)
    if 0 < more <= _ENDS and found[more:] == expected:
        return finding("prompt-start-token", target, question=name, tokens=repr(known.text(found[:more])))
    if 0 < more <= _ENDS and found[:-more] == expected:
        return finding("prompt-end-token", target, question=name, tokens=repr(known.text(found[-more:])))
    if 0 < -more <= _ENDS and expected[:more] == found:
        return finding("prompt-lost-end", target, question=name, tokens=repr(known.text(expected[more:])))
    if more < 0 and found and _is_cut_from(found, expected):
        return finding(
            "prompt-truncated", target, question=name, found=f"{len(found):,}", expected=f"{len(expected):,}"
        )
    return None


def _is_cut_from(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether `found` is a beginning of `expected` and an end of it."""
    first = _agreeing(found, expected)
    rest = len(found) - first
    return rest == 0 or expected[-rest:] == found[-rest:]


def _agreeing(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens agree from the beginning."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(found), len(expected)))


def _other_instruction(
    name: str, question: Question, found: Ids, expected: Ids, known: KnownPrompts, target: str
) -> Finding | None:
    before, has_one, after = known.official(question).template.partition("{instruction}")
    mine, theirs = known.text(found), known.text(expected)
    end = after[: after.index("{")]
    if not has_one or not mine.startswith(before) or end not in mine[len(before) :]:
        return None
    instructions = [text[len(before) :].partition(end) for text in (mine, theirs)]
    if instructions[0][0] == instructions[1][0] or instructions[0][2] != instructions[1][2]:
        return None
    shown = [repr(each[0]) for each in instructions]
    return finding("prompt-other-instruction", target, question=name, found=shown[0], expected=shown[1])


def _other_reading(
    name: str, question: Question, found: Ids, expected: Ids, known: KnownPrompts, target: str
) -> Finding:
    place = _agreeing(found, expected)
    mine, theirs = (repr(known.text(ids[max(place - 1, 0) : place + _AROUND])) for ids in (found, expected))
    text = known.text(found)
    if text == known.text(expected):
        return finding("prompt-other-tokens", target, question=name, place=place, found=mine)
    sides = (question.query, question.document) if isinstance(question, Pair) else (question,)
    texts = [side.joined_text for side in sides if side.joined_text]
    if texts and not any(each in text for each in texts):
        return finding("prompt-other-tokenizer", target, question=name, found=repr(text[:80]))
    return finding("prompt-differs", target, question=name, place=place, found=mine, expected=theirs)
