"""Asking the models: the reference, the reference in bf16, the artefact.

Rule: one model is in memory at a time, and every answer is on the disk before the next question is asked of anyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from qtool.inputs.panels import Panel
from qtool.progress import StageProgress
from qtool.scoring.runtime import RuntimeOptions, gguf_file, open_runtime
from qtool.scoring.scorer import Identity, Scorer
from qtool.verification.answers import Answers, answer, work
from qtool.verification.case import Case
from qtool.verification.report import Side

NOISE_DTYPE: Final = "bfloat16"
_FOLDER: Final = "answers"


class Voice(str, Enum):
    """Who answers; also the name of the file of answers."""

    REFERENCE = "reference"
    NOISE = "noise"
    ARTEFACT = "artefact"


@dataclass(frozen=True)
class Heard:
    """What one voice answered to each panel, and what its answers depend on."""

    side: Side
    answers: tuple[Answers, ...]


def open_voice(case: Case, voice: Voice) -> Scorer:
    """The runtime behind a voice; no weight is read yet."""
    options = case.options
    if voice is Voice.ARTEFACT:
        target = options.artefact if case.artefact is None else str(case.artefact)
        return open_runtime(target, _runtime_options(case))
    dtype = NOISE_DTYPE if voice is Voice.NOISE else options.dtype
    return open_runtime(str(case.reference), RuntimeOptions(case.task, dtype, options.device))


def _runtime_options(case: Case) -> RuntimeOptions:
    options = case.options
    if gguf_file(str(case.artefact)) is not None:  # runs as the file says
        return RuntimeOptions(case.task, mmproj=options.mmproj)
    return RuntimeOptions(case.task, options.dtype, options.device, mmproj=options.mmproj)


def hear(case: Case, voice: Voice, panels: Sequence[Panel], progress: StageProgress) -> Heard:
    """Ask a voice everything in `panels`, except what it has answered before."""
    scorer = open_voice(case, voice)
    side = side_of(case, voice, scorer.identity)
    with _remembering(scorer) as remembering:
        counter = _Counter(voice.value, panels, case, progress)
        return Heard(
            side, tuple(answer(panel, remembering, case.task, case.query_instruction, counter) for panel in panels)
        )


def side_of(case: Case, voice: Voice, identity: Identity) -> Side:
    """How the report names a voice."""
    name = case.options.artefact if voice is Voice.ARTEFACT else case.options.reference
    sha256 = identity.model if identity.is_pinned else None
    return Side(name, identity.engine, identity.numbers, sha256, identity.prompt)


def answer_file(folder: Path, voice: Voice) -> Path:
    """Where a verification keeps the answers of a voice."""
    return folder / _FOLDER / f"{voice.value}.jsonl"


@contextmanager
def _remembering(scorer: Scorer) -> Iterator[Scorer]:
    with ExitStack() as stack:
        stack.callback(scorer.close)
        yield scorer


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
