"""Asking the models: the reference, the reference in bf16, the artefact.

Rule: one model is in memory at a time, and every answer is on the disk before the next question is asked of anyone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from qtool.answers.cache import cached
from qtool.answers.ledger import open_ledger
from qtool.answers.remembering import Remembering
from qtool.inputs.panels import Panel
from qtool.progress import StageProgress
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.scorer import Identity, Scorer
from qtool.verification.answers import Answers, answer, work
from qtool.verification.case import Case, artefact_runtime
from qtool.verification.folder import ANSWERS
from qtool.verification.report import Side

NOISE_DTYPE: Final = "bfloat16"


class Voice(str, Enum):
    """Who answers; also the name of the file of answers."""

    REFERENCE = "reference"
    NOISE = "noise"
    ARTEFACT = "artefact"


@dataclass(frozen=True)
class Heard:
    """What one voice answered to each panel, what its answers depend on, and how long it took, loading included."""

    side: Side
    answers: tuple[Answers, ...]
    seconds: float = 0.0


def open_voice(case: Case, voice: Voice) -> Scorer:
    """The runtime behind a voice; no weight is read yet."""
    options = case.options
    if voice is Voice.ARTEFACT:
        target = options.artefact if case.artefact is None else str(case.artefact)
        return open_runtime(target, artefact_runtime(options, case.artefact, case.task, case.family))
    dtype = NOISE_DTYPE if voice is Voice.NOISE else options.dtype
    return open_runtime(str(case.reference), RuntimeOptions(case.task, dtype, options.device))


def hear(case: Case, voice: Voice, panels: Sequence[Panel], progress: StageProgress) -> Heard:
    """Ask a voice everything in `panels`, except what it has answered before."""
    started = time.monotonic()
    with closing(_remembering(case, voice, open_voice(case, voice))) as scorer:
        counter = _Counter(voice.value, panels, case, progress)
        answers = tuple(answer(panel, scorer, case.task, case.query_instruction, counter) for panel in panels)
        return Heard(_side(case, voice, scorer.identity), answers, time.monotonic() - started)


def _side(case: Case, voice: Voice, identity: Identity) -> Side:
    """How the report names a voice."""
    name = case.options.artefact if voice is Voice.ARTEFACT else case.options.reference
    sha256 = identity.model if identity.is_pinned else None
    return Side(name, identity.engine, identity.numbers, sha256, identity.prompt)


def answer_file(folder: Path, voice: Voice) -> Path:
    """Where a verification keeps the answers of a voice."""
    return folder / ANSWERS / f"{voice.value}.jsonl"


def _remembering(case: Case, voice: Voice, scorer: Scorer) -> Scorer:
    remembering = cached(scorer) if case.options.use_cache else scorer
    if case.options.output is None:
        return remembering
    return Remembering(remembering, open_ledger(answer_file(case.options.output, voice), scorer.identity))


class _Counter:
    """Adds up what a scorer answers, since it counts from zero on each panel."""

    def __init__(self, voice: str, panels: Sequence[Panel], case: Case, progress: StageProgress) -> None:
        self._voice, self._progress = voice, progress
        self._total = sum(work(panel, case.task, case.query_instruction) for panel in panels)
        self._done = 0
        self._progress(self._voice, 0, self._total)

    def __call__(self, _place: int, _answer: object) -> None:
        self._done += 1
        self._progress(self._voice, self._done, self._total)
