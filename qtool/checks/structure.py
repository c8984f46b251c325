"""The structure stage: what headers and small files tell, in seconds and without a weight."""

from __future__ import annotations

import time
from collections.abc import Iterator

from qtool.artefact import Artefact, GgufArtefact
from qtool.checks.checkpoint import checkpoint_findings
from qtool.checks.findings import Finding, finding
from qtool.checks.gguf import gguf_findings
from qtool.checks.gguf_reference import language_findings, projector_findings
from qtool.checks.reference import Reference
from qtool.checks.stage import STRUCTURE, Stage, concluded
from qtool.checks.structure_folder import folder_findings, nbytes_of
from qtool.errors import ModelError

# First everything that an inspection knows of the artefact by itself, then what only the reference can tell.


def check_structure(artefact: Artefact, reference: Reference) -> Stage:
    """Compare the artefact with the reference, which must declare its task or have been opened with one.

    Raises ModelError if the reference is broken, UsageError if it is quantized; what is wrong with the artefact is a
    finding.
    """
    started = time.monotonic()
    reference.require_unquantized()
    findings: list[Finding] = []
    ratio = 0.0
    try:
        if isinstance(artefact, GgufArtefact):
            findings += _gguf_findings(artefact, reference)
            nbytes = sum(model.nbytes for model in artefact.models)
        else:
            findings += checkpoint_findings(artefact)
            findings += folder_findings(artefact, reference)
            nbytes = nbytes_of(artefact.checkpoint)
        ratio = nbytes / max(nbytes_of(reference.checkpoint), 1)
    except ModelError as error:
        findings.append(finding("unreadable", artefact.path, problem=str(error)))
    return concluded(STRUCTURE, started, findings, f"Matches the reference in structure, at {ratio:.2f} of its size.")


def _gguf_findings(artefact: GgufArtefact, reference: Reference) -> Iterator[Finding]:
    yield from gguf_findings(artefact, reference.detection.require_task())
    yield from language_findings(artefact.model, reference)
    if artefact.projector is not None and reference.family.is_vision:
        yield from projector_findings(artefact.projector, reference.projector)
