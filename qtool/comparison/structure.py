"""Stage 1: what headers and small files tell, in seconds and without a weight.

Rule: first everything that an inspection knows of the artefact by itself, then what only the reference can tell.
"""

from __future__ import annotations

import time
from pathlib import Path

from qtool.arch.detect import Detection, detect
from qtool.arch.spec import Task
from qtool.checkpoint.reader import Checkpoint, open_checkpoint
from qtool.comparison.catalogue import finding
from qtool.comparison.sides import GgufFiles, gguf_files, open_reference, plan_conversion, read_side
from qtool.comparison.stage import STRUCTURE, Stage, concluded
from qtool.comparison.structure_folder import folder_findings, size_ratio
from qtool.comparison.structure_gguf import language_findings, projector_findings
from qtool.errors import ModelError
from qtool.inspection.finding import Finding
from qtool.inspection.run import inspect


def check_structure(artefact: Path, reference: Path, task: Task | None = None, mmproj: Path | None = None) -> Stage:
    """Compare the artefact (a checkpoint's folder, a GGUF file or a folder of those) with the folder `reference`.

    `task` is needed where the reference declares none. Raises ModelError if the reference is broken, UsageError if it is
    quantized; what is wrong with the artefact is a finding.
    """
    started = time.monotonic()
    checkpoint, detection = open_reference(reference, task)
    files = gguf_files(artefact, mmproj)
    findings: list[Finding] = []
    ratio = 0.0
    try:
        for each in files.paths if files else (artefact,):
            findings += inspect(str(each), detection.task if files and each == files.language else task).findings
        if files:
            more, ratio = _gguf_findings(files, checkpoint, detection)
            findings += more
        else:
            own = open_checkpoint(artefact)
            findings += folder_findings(artefact, own, detect(artefact, task), checkpoint, detection)
            ratio = size_ratio(own, checkpoint)
    except ModelError as error:
        findings.append(finding("unreadable", artefact, problem=str(error)))
    return concluded(STRUCTURE, started, findings, f"As the reference would have it, {ratio:.2f} of its size.")


def _gguf_findings(files: GgufFiles, reference: Checkpoint, detection: Detection) -> tuple[list[Finding], float]:
    """What is wrong with the files, and their size in parts of the reference's."""
    is_vision = detection.architecture.is_vision
    wants_projector = is_vision and files.projector is not None
    language, projector = plan_conversion(reference.directory, detection.task, projector=wants_projector)
    sides = [read_side(path) for path in files.paths]
    findings = list(language_findings(sides[0], language, detection.task, is_vision=is_vision))
    if projector:
        findings += projector_findings(sides[1], projector)
    stored = sum(info.nbytes for info in reference.tensors.values())
    return findings, sum(side.nbytes for side in sides) / stored
