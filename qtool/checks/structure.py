"""The structure stage: what headers and small files tell, in seconds and without a weight."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from qtool.artefact import Artefact, GgufArtefact
from qtool.checks.checkpoint import checkpoint_findings
from qtool.checks.checkpoint_model import CheckpointModel
from qtool.checks.checkpoint_quantization import foreign_quantization
from qtool.checks.checkpoint_sources import source_findings
from qtool.checks.findings import Finding, finding
from qtool.checks.gguf import gguf_findings
from qtool.checks.gguf_reference import language_findings, projector_findings
from qtool.checks.reference import Reference
from qtool.checks.stage import STRUCTURE, Outcome, Stage, concluded
from qtool.checks.structure_folder import folder_findings, nbytes_of
from qtool.errors import ModelError

_INHERITED: Final = (
    "safetensors-two-sources",
    "safetensors-own-code",
    "safetensors-code-file",
    "safetensors-declared-type",
    "safetensors-unread-weights",
)
"""What is no fault where the reference has it, too: every engine then reads the same from both."""


# First everything that an inspection knows of the artefact by itself, then what only the reference can tell.


def check_structure(artefact: Artefact, reference: Reference) -> Stage:
    """Compare the artefact with the reference, which must declare its task or have been opened with one.

    Raises ModelError if the reference is broken, UsageError if it is quantized; what is wrong with the artefact is a
    finding.
    """
    started = time.monotonic()
    reference.require_unquantized()
    findings: list[Finding] = []
    ratio, unread = 0.0, ""
    try:
        if isinstance(artefact, GgufArtefact):
            findings += _gguf_findings(artefact, reference)
            nbytes = sum(model.nbytes for model in artefact.models)
        else:
            unread = foreign_quantization(artefact.checkpoint)
            inherited = {each for each in source_findings(CheckpointModel.of(reference)) if each.code in _INHERITED}
            findings += [each for each in checkpoint_findings(artefact) if each not in inherited]
            if not any(each.code == "safetensors-field-type" for each in findings):
                findings += folder_findings(artefact, reference, weights=not unread)
            nbytes = nbytes_of(artefact.checkpoint)
        ratio = nbytes / max(nbytes_of(reference.checkpoint), 1)
    except ModelError as error:
        findings.append(finding("unreadable", artefact.path, problem=str(error)))
    good = f"Matches the reference in structure, at {ratio:.2f} of its size."
    if unread:
        findings.append(finding("unread-quantization", artefact.path, what=unread))
        good = findings[-1].sentence
    findings = [_named(each, artefact) for each in findings]
    stage = concluded(STRUCTURE, started, findings, good)
    return replace(stage, outcome=Outcome.INCONCLUSIVE) if unread and stage.outcome is Outcome.PASS else stage


def _named(found: Finding, artefact: Artefact) -> Finding:
    """The finding by the repository's name where only headers were read, not by the folder that they lie in."""
    path = str(artefact.path)
    if path == artefact.target:
        return found
    sentence, remedy = found.sentence.replace(path, artefact.target), found.remedy.replace(path, "FOLDER")
    return replace(found, sentence=sentence, remedy=remedy)


def _gguf_findings(artefact: GgufArtefact, reference: Reference) -> Iterator[Finding]:
    yield from gguf_findings(artefact, reference.detection.require_task())
    yield from language_findings(artefact.model, reference)
    if artefact.projector is not None and reference.family.is_vision:
        yield from projector_findings(artefact.projector, reference.projector)
