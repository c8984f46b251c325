"""Stage 3: whether both models read the same tokens and pictures, and if not, what the artefact reads instead.

Rule: ids are compared, not texts. A runtime that does not tell its ids is asked for scores, and the known prompt under
which the reference scores alike is the one that it reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np

from qtool.arch.detect import detect
from qtool.arch.prompts import PromptSpec
from qtool.comparison.catalogue import finding
from qtool.comparison.prompt_differences import difference
from qtool.comparison.prompt_known import KnownPrompts, Question
from qtool.comparison.stage import PROMPT, Stage, concluded, skipped
from qtool.inputs.items import Pair
from qtool.inspection.finding import Finding
from qtool.scoring.scorer import PromptSeen, Scorer

_ASKED: Final = 8
"""Pairs that are scored where the runtime does not tell its ids."""
_CLEARLY: Final = 0.25
"""How far, in parts of the official prompt's distance, another prompt's must be below it."""
_NOISE: Final = 0.1
"""Log-odds by which bf16 and 16-bit engines differ on the same prompt; below it no other prompt is looked for."""


@runtime_checkable
class Rereader(Protocol):
    """A scorer that can read its questions under another prompt."""

    def under(self, prompt: PromptSpec) -> Scorer:
        """The same model under `prompt`."""


def compare_prompts(
    reference: Scorer, artefact: Scorer, questions: Sequence[Question], folder: Path, target: str
) -> Stage:
    """Compare what both read of a few `questions`.

    `folder` is the reference's, whose tokenizer names what differs; `target` is the artefact as the user named it.
    """
    started = time.monotonic()
    known = KnownPrompts(folder, is_vision=detect(folder).architecture.is_vision)
    findings: list[Finding] = []
    untold: list[Pair] = []
    told = 0
    for question in questions:
        seen, expected = artefact.prompt_seen(question), reference.prompt_seen(question)
        if seen is not None and expected is not None:
            told += 1
            findings += _differences(question, seen, expected, known, target)
        elif isinstance(question, Pair):
            untold.append(question)
    if untold and isinstance(reference, Rereader):
        findings += _fit(reference, artefact, untold[:_ASKED], known, target)
    elif not told:
        return skipped(PROMPT, f"{artefact.identity.engine} does not tell what it reads.")
    return concluded(PROMPT, started, findings, _summary(told, len(untold[:_ASKED])))


def _summary(told: int, untold: int) -> str:
    parts = [f"{told} questions are read as the same tokens and pictures"] if told else []
    parts += [f"{untold} pairs fit the official prompt best"] if untold else []
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
        yield finding("prompt-untold", target, engine=artefact.identity.engine, pairs=len(pairs))


def _distance(reference: Rereader, prompt: PromptSpec, pairs: Sequence[Pair], answers: np.ndarray) -> float:
    scores = np.array(reference.under(prompt).score(pairs))
    return float(np.sqrt(np.mean((scores - answers) ** 2)))
