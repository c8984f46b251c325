"""`inspect`: say what each artefact at a place is and what is wrong with it, by its headers and small files.

No weights are read but NVFP4's global scales, four bytes each, and of a reranker's GGUF file on this disk four rows: those
of the rank head and of the words yes and no.
"""

from __future__ import annotations

from qtool.arch.spec import Task
from qtool.checks.checkpoint import inspect_checkpoint
from qtool.checks.gguf import inspect_gguf_files
from qtool.checks.report import InspectionReport, shown
from qtool.errors import ModelError
from qtool.progress import StageProgress, ignore
from qtool.storage.location import open_location

_SAFETENSORS = ".safetensors"


def inspect(
    target: str,
    task: Task | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: StageProgress = ignore,
) -> InspectionReport:
    """Inspect a GGUF file, a folder or a repository on the hub.

    `target` is a path, a built-in demo model, `org/name` or `hf://org/name[@revision][/file]`; `task` is what it should
    be for, where its own fields cannot say. Raises ModelError if a header is corrupt, NetworkError if the hub fails.
    """
    location = open_location(target, revision, token)
    is_checkpoint = location.selected is not None and location.selected.endswith(_SAFETENSORS)
    artefacts = [] if is_checkpoint else list(inspect_gguf_files(location, task, progress))
    if is_checkpoint or location.selected is None:
        artefacts += inspect_checkpoint(location, task, progress)
    if not artefacts:
        raise ModelError(
            f"{target} holds neither GGUF nor safetensors files.", "Pass a file, or the folder that holds them."
        )
    return InspectionReport(target, location.revision, location.fetched, tuple(map(shown, artefacts)))
