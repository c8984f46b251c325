"""The prompt stage: whether both models read the same tokens and pictures, and if not, what the artefact reads instead."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol, runtime_checkable

import numpy as np

from qtool.arch.families import reranker_prompts
from qtool.arch.prompts import PromptSpec
from qtool.artefact import CheckpointArtefact
from qtool.checks.findings import Finding, finding
from qtool.checks.stage import PROMPT, Stage, concluded, skipped
from qtool.inputs.items import Item, Pair
from qtool.scoring.prompt import PromptBuilder
from qtool.scoring.scorer import PromptSeen, Scorer
from qtool.scoring.tokenizer import PromptTokenizer

# The wrong prompts that runtimes are known to read. Each is rendered by the builder of the official prompts, so that
# pictures and truncation are the same.

Question = Pair | Item

_BARE_PAIRS: Final = ("{query}{document}", "{query} {document}", "{query}\n{document}", "{query}\n\n{document}")
"""What vLLM and TEI put together without a template, and what people write by hand."""
_INSTRUCTION: Final = r"<\|im_start\|>system\n\{instruction\}<\|im_end\|>\n|<?Instruct>?: \{instruction\}\n?"
"""The part of an official template that holds the instruction."""


class KnownPrompts:
    """The official prompts of the reference, and the known wrong ones, as ids of its tokenizer."""

    def __init__(self, reference: CheckpointArtefact) -> None:
        self._family = reference.family
        self._tokenizer = PromptTokenizer.read(reference.path)

    def official(self, question: Question) -> PromptSpec:
        """The official prompt for a question of this kind."""
        return self._family.reranker if isinstance(question, Pair) else self._family.embedder

    def wrong(self, question: Question) -> Iterator[tuple[str, PromptSpec]]:
        """Code and prompt of each known mistake."""
        official = self.official(question)
        uninstructed = re.sub(_INSTRUCTION, "", official.template)
        if not isinstance(question, Pair):
            yield "prompt-missing-template", replace(official, template="{content}", bare_template="{content}")
            yield "prompt-no-instruction", replace(official, template=uninstructed)
            return
        others = [each for each in reranker_prompts() if each.template != official.template]
        for other in others:
            code = "prompt-vision-template" if other.sees_pictures else "prompt-text-template"
            for instruction in dict.fromkeys((other.default_instruction, official.default_instruction)):
                yield code, replace(official, template=other.template, default_instruction=instruction)
        for template in _BARE_PAIRS:
            yield "prompt-missing-template", replace(official, template=template)
        for other in others:
            yield "prompt-other-instruction", replace(official, default_instruction=other.default_instruction)
        yield "prompt-no-instruction", replace(official, template=uninstructed)

    def seen(self, question: Question, prompt: PromptSpec) -> PromptSeen:
        """What the reference would read under `prompt`."""
        builder = PromptBuilder(self._tokenizer, prompt)
        built = builder.pair(question) if isinstance(question, Pair) else builder.item(question)
        return PromptSeen(built.token_ids)

    def text(self, ids: tuple[int, ...]) -> str:
        """The text of ids to the reference; ids that it does not have are left out."""
        return self._tokenizer.text(ids)


# How two prompts differ: a known mistake is named; any other is shown at the first token that differs.

Ids = tuple[int, ...]

_ENDS: Final = 3
"""A tokenizer adds or forgets up to this many tokens at an end; more missing ones are a cut."""
_AROUND: Final = 6


def difference(question: Question, found: Ids, expected: Ids, known: KnownPrompts, target: str) -> Finding:
    """What is wrong with the ids `found`."""
    name = _name(question)
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


# The stage. Ids are compared, not texts. A runtime that does not report its ids is asked for scores: the known prompt
# under which the reference gives the same scores is the one that it reads.

_SCORED: Final = 8
"""Pairs that are scored where the runtime does not report its ids."""
_CLEARLY: Final = 0.25
"""Another prompt must be this much nearer: its distance at most this part of the official prompt's."""
_UNKNOWN: Final = 1.0
"""Log-odds by which scores are so far from the official prompt's that they say nothing of the prompt."""
_NOISE: Final = 0.1
"""Log-odds by which bf16 and 16-bit engines differ on the same prompt; below it no other prompt is looked for."""


@runtime_checkable
class Rereader(Protocol):
    """A scorer that can read its questions under another prompt."""

    def under(self, prompt: PromptSpec) -> Scorer:
        """The same model under `prompt`."""


def compare_prompts(
    reference: Scorer, artefact: Scorer, questions: Sequence[Question], opened: CheckpointArtefact, target: str
) -> Stage:
    """Compare what both scorers read of a few `questions`.

    `opened` is the reference, whose tokenizer names what differs; `target` is the artefact as the user named it.
    """
    started = time.monotonic()
    known = KnownPrompts(opened)
    findings: list[Finding] = []
    unreported: list[Pair] = []
    compared = 0
    for question in questions:
        seen, expected = artefact.prompt_seen(question), reference.prompt_seen(question)
        if seen is not None and expected is not None:
            compared += 1
            findings += _differences(question, seen, expected, known, target)
        elif isinstance(question, Pair):
            unreported.append(question)
    if unreported and isinstance(reference, Rereader):
        findings += _fit(reference, artefact, unreported[:_SCORED], known, target)
    elif not compared:
        return skipped(PROMPT, f"{artefact.identity.engine} does not report what it reads.")
    is_unknown = any(each.code == "prompt-unknown" for each in findings)
    return concluded(PROMPT, started, findings, _summary(compared, len(unreported[:_SCORED]), is_unknown=is_unknown))


def _summary(compared: int, scored: int, *, is_unknown: bool) -> str:
    parts = [f"{compared} questions are read as the same tokens and pictures"] if compared else []
    parts += [f"{scored} pairs fit {'no known prompt' if is_unknown else 'the official prompt best'}"] if scored else []
    return "; ".join(parts) + "."


def _differences(
    question: Question, seen: PromptSeen, expected: PromptSeen, known: KnownPrompts, target: str
) -> Iterator[Finding]:
    if seen.token_ids != expected.token_ids:
        yield difference(question, seen.token_ids, expected.token_ids, known, target)
    elif seen.grids != expected.grids:
        grids = str(list(seen.grids)), str(list(expected.grids))
        yield finding("prompt-pictures", target, question=_name(question), found=grids[0], expected=grids[1])


def _name(question: Question) -> str:
    return question.name if isinstance(question, Pair) else f"item {question.id!r}"


def _fit(
    reference: Rereader, artefact: Scorer, pairs: Sequence[Pair], known: KnownPrompts, target: str
) -> Iterator[Finding]:
    """The known prompt whose scores are clearly nearer than the official one's."""
    answers = np.array(artefact.score(pairs))
    official = known.official(pairs[0])
    distance = _distance(reference, official, pairs, answers)
    others = known.wrong(pairs[0]) if distance > _NOISE else ()
    found = [(_distance(reference, prompt, pairs, answers), code, prompt) for code, prompt in others]
    best, code, prompt = min(found, key=lambda each: each[0], default=(np.inf, "", official))
    if best < _CLEARLY * distance:
        facts = {"found": repr(prompt.default_instruction), "expected": repr(official.default_instruction)}
        yield finding(code, target, question=f"{len(pairs)} pairs", **facts)
    else:
        code = "prompt-unknown" if distance > _UNKNOWN else "prompt-untold"
        yield finding(code, target, engine=artefact.identity.engine, pairs=len(pairs))


def _distance(reference: Rereader, prompt: PromptSpec, pairs: Sequence[Pair], answers: np.ndarray) -> float:
    scores = np.array(reference.under(prompt).score(pairs))
    return float(np.sqrt(np.mean((scores - answers) ** 2)))
