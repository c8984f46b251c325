"""`inspect`: find the place, read headers, say what each artefact is and what is wrong with it.

Rule: no weight is read, neither from the disk nor over the network; NVFP4's global scales, four bytes each, are, and of
a reranker's GGUF file on this disk the four rows that every score hangs on.
"""

from __future__ import annotations

from qtool.arch.spec import Task
from qtool.checks.checkpoint import checkpoint_artefacts
from qtool.checks.gguf import gguf_artefacts
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
    place = open_location(target, revision, token)
    is_checkpoint = place.selected is not None and place.selected.endswith(_SAFETENSORS)
    artefacts = [] if is_checkpoint else list(gguf_artefacts(place, task, progress))
    if is_checkpoint or place.selected is None:
        artefacts += checkpoint_artefacts(place, task, progress)
    if not artefacts:
        raise ModelError(f"{target} holds neither GGUF nor safetensors files.")
    return InspectionReport(target, place.revision, place.fetched, tuple(map(shown, artefacts)))
