"""What all stages have in common: how a list of findings becomes an outcome.

Rule: what is broken fails a stage; a warning or a note does not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from qtool.inspection.finding import Finding, Severity
from qtool.verification.report import Stage, StageOutcome

STRUCTURE, WEIGHTS, REDERIVE, PROMPT = "structure", "weights", "rederive", "prompt"


def concluded(name: str, started: float, findings: Sequence[Finding], good: str, bad: str = "") -> Stage:
    """The stage that began at `started` (monotonic): `good` sums it up if nothing is broken, `bad` otherwise."""
    broken = [each for each in findings if each.severity is Severity.BROKEN]
    outcome = StageOutcome.FAIL if broken else StageOutcome.PASS
    summary = (bad or counted(broken)) if broken else good
    return Stage(name, outcome, summary, tuple(dict.fromkeys(findings)), round(time.monotonic() - started, 3))


def skipped(name: str, reason: str) -> Stage:
    """A stage that does not apply, and why."""
    return Stage(name, StageOutcome.SKIPPED, reason)


def counted(findings: Sequence[Finding]) -> str:
    """The first finding and how many more there are."""
    more = f" And {len(findings) - 1} more." if len(findings) > 1 else ""
    return findings[0].sentence + more
