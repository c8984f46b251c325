"""One stage of a verification and its outcome: a broken finding fails it, a warning or a note does not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from qtool.checks.findings import Finding, Severity

STRUCTURE, WEIGHTS, REDERIVE, PANELS, PROMPT = "structure", "weights", "rederive", "panels", "prompt"


class Outcome(str, Enum):
    """What became of one stage, or of one gate on one panel."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Stage:
    """One step of the verification: structure, weights, rederive, panels, prompt, noise, scores or ranking."""

    name: str
    outcome: Outcome
    summary: str
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class TensorError:
    """How far one dequantized weight is from the source, relative (Frobenius); `bound` is what its format allows.

    `tensor` is its name in the artefact: a Hugging Face name in a checkpoint, llama.cpp's in a GGUF file.
    """

    tensor: str
    format: str
    relative_error: float
    bound: float


@dataclass(frozen=True)
class RederivedFile:
    """A file of the artefact, and the same file as quantizing the reference again gives it (None where there is none)."""

    name: str
    sha256: str
    rederived_sha256: str | None

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same bytes."""
        return self.sha256 == self.rederived_sha256


def concluded(name: str, started: float, findings: Sequence[Finding], good: str, bad: str = "") -> Stage:
    """The stage that began at `started` (monotonic): `good` sums it up if nothing is broken, `bad` otherwise."""
    broken = [each for each in findings if each.severity is Severity.BROKEN]
    outcome = Outcome.FAIL if broken else Outcome.PASS
    summary = (bad or counted(broken)) if broken else good
    return Stage(name, outcome, summary, tuple(dict.fromkeys(findings)), round(time.monotonic() - started, 3))


def skipped(name: str, reason: str) -> Stage:
    """A stage that does not apply, and why."""
    return Stage(name, Outcome.SKIPPED, reason)


def counted(findings: Sequence[Finding]) -> str:
    """The first finding and how many more there are."""
    more = f" And {len(findings) - 1} more." if len(findings) > 1 else ""
    return findings[0].sentence + more
