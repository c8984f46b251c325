"""All cases, by the step that must find them."""

from __future__ import annotations

from tests.checks import (
    engine_cases,
    folder_cases,
    gguf_cases,
    gguf_field_cases,
    loader_cases,
    prompt_cases,
    rederive_cases,
    weight_cases,
    weight_change_cases,
)
from tests.checks.registry import CASES, PROMPT, REDERIVE, STEPS, STRUCTURE, WEIGHTS, Case

MODULES = (
    gguf_cases,
    gguf_field_cases,
    folder_cases,
    loader_cases,
    engine_cases,
    weight_cases,
    weight_change_cases,
    rederive_cases,
    prompt_cases,
)
# In one order, whichever of the modules a test imported first: docs/broken-artefacts.md is made from it.
CASES.sort(key=lambda case: [each.__name__ for each in MODULES].index(case.breaks.__module__))
__all__ = ["CASES", "PROMPT", "REDERIVE", "STEPS", "STRUCTURE", "WEIGHTS", "Case"]
