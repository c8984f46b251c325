"""The corpus of broken artefacts: what breaks each, which step must find it, and what it must say.

Rule: a case is a function that breaks a copy of a good artefact; its name and its docstring say what is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STRUCTURE, WEIGHTS, REDERIVE, PROMPT = "structure", "weights", "rederive", "prompt"
STEPS = (STRUCTURE, WEIGHTS, REDERIVE, PROMPT)
"""From the cheapest to the dearest; scores come last and find what no file shows."""


@dataclass(frozen=True)
class Case:
    """One way to break the artefact `of` (a reference and a type), found by `step` as `code`."""

    name: str
    what: str
    of: str
    step: str
    code: str
    breaks: Callable


CASES: list[Case] = []


def case(step: str, code: str, *of: str):
    """Register a function that breaks a folder, once for each kind of artefact in `of`."""

    def register(breaks: Callable[[Path], object]):
        for kind in of:
            name = breaks.__name__.replace("_", "-")
            CASES.append(Case(name, breaks.__doc__ or "", kind, step, code, breaks))
        return breaks

    return register
