"""Stage 1: what headers and small files tell, in seconds and without a weight.

Rule: first everything that an inspection knows of the artefact by itself, then what only the reference can tell.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from qtool.arch.detect import Detection, detect
from qtool.arch.spec import Task
from qtool.checkpoint.reader import Checkpoint, open_checkpoint
from qtool.errors import ModelError
from qtool.inspection.finding import Finding
from qtool.inspection.run import inspect
from qtool.verification.catalogue import finding
from qtool.verification.report import Stage
from qtool.verification.sides import GgufFiles, gguf_files, open_reference, plan_conversion, read_side
from qtool.verification.stages import STRUCTURE, concluded
from qtool.verification.structure_folder import folder_findings, size_ratio
from qtool.verification.structure_gguf import language_findings, projector_findings


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
            findings += _gguf_findings(files, reference, detection)
            ratio = _gguf_ratio(files, checkpoint)
        else:
            own = open_checkpoint(artefact)
            findings += folder_findings(artefact, own, detect(artefact, task), checkpoint, detection)
            ratio = size_ratio(own, checkpoint)
    except ModelError as error:
        findings.append(finding("unreadable", artefact, problem=str(error)))
    return concluded(STRUCTURE, started, findings, f"As the reference would have it, {ratio:.2f} of its size.")


def _gguf_findings(files: GgufFiles, reference: Path, detection: Detection) -> Iterator[Finding]:
    is_vision = detection.architecture.is_vision
    language, projector = plan_conversion(reference, detection.task, projector=is_vision and bool(files.projector))
    yield from language_findings(read_side(files.language), language, detection.task, is_vision=is_vision)
    if projector and files.projector:
        yield from projector_findings(read_side(files.projector), projector)


def _gguf_ratio(files: GgufFiles, reference: Checkpoint) -> float:
    stored = sum(info.nbytes for info in reference.tensors.values())
    return sum(read_side(path).nbytes for path in files.paths) / stored
