"""The two models of a comparison by their headers: a checkpoint's folder, or GGUF files and the projector beside them.

Rule: the reference is a plain checkpoint; what a GGUF file should hold is what converting the reference would write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qtool.arch.detect import Detection, detect
from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.export.convert import prepare_conversion
from qtool.export.gguf_files import MODEL, PlannedFile
from qtool.export.gguf_plan import NO_PROJECTOR, ConvertOptions
from qtool.storage.checkpoint import Checkpoint, open_checkpoint
from qtool.storage.gguf import GgufFile, GgufTensor, Value, parse_gguf, read_gguf
from qtool.storage.gguf_model import model_files
from qtool.storage.packed import is_quantized

_SUFFIX: Final = ".gguf"
_PROJECTOR_NAME: Final = "mmproj"
_PLANNED_TYPE: Final = "q8_0"
"""Shows which tensors a converter never quantizes: those that are no Q8_0 in it."""


@dataclass(frozen=True)
class GgufSide:
    """One GGUF model: its fields, and its tensors with the file that each lies in."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, tuple[Path, GgufTensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors.values())


@dataclass(frozen=True)
class GgufFiles:
    """A language model and its projector, either of which may be missing."""

    language: Path
    projector: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files (of a split model, the first part)."""
        return (self.language, self.projector) if self.projector else (self.language,)


@dataclass(frozen=True)
class Planned:
    """A GGUF file as converting the reference would write it."""

    file: PlannedFile
    metadata: Mapping[str, Value]


def open_reference(folder: Path, task: Task | None) -> tuple[Checkpoint, Detection]:
    """The reference; raises UsageError if that is quantized itself."""
    checkpoint = open_checkpoint(folder)
    if is_quantized(checkpoint.config):
        raise UsageError(
            f"{folder} is quantized itself and can be no reference.", "Name the model that it was made from."
        )
    return checkpoint, detect(folder, task)


def gguf_files(artefact: Path, mmproj: Path | None = None) -> GgufFiles | None:
    """The GGUF files that `artefact` (a file or a folder) stands for; None of a safetensors checkpoint."""
    if artefact.is_file() and artefact.suffix == _SUFFIX:
        return GgufFiles(artefact, mmproj or _projector_in(artefact.parent, artefact.name))
    if not artefact.is_dir() or (artefact / "config.json").is_file():
        return None
    names = [path.name for path in artefact.glob(f"*{_SUFFIX}") if _PROJECTOR_NAME not in path.name]
    models = [files[0] for files in model_files(names, None).values()]
    if not models:
        raise ModelError(f"{artefact} holds neither config.json nor GGUF files.")
    if len(models) > 1:
        raise UsageError(f"{artefact} holds {', '.join(sorted(models))}.", "Pass one of the files.")
    return GgufFiles(artefact / models[0], mmproj or _projector_in(artefact, models[0]))


def _projector_in(folder: Path, model: str) -> Path | None:
    found = sorted(p for p in folder.glob(f"*{_SUFFIX}") if _PROJECTOR_NAME in p.name and p.name != model)
    if len(found) > 1:
        raise UsageError(f"{folder} holds several projectors: {', '.join(p.name for p in found)}.", "Pass --mmproj.")
    return found[0] if found else None


def read_side(path: Path) -> GgufSide:
    """A GGUF model by the path of its first part."""
    first = read_gguf(path)
    tensors = {name: (path, tensor) for name, tensor in first.tensors.items()}
    for name in next(iter(model_files([p.name for p in path.parent.glob(f"*{_SUFFIX}")], path.name).values())):
        part = path.with_name(name)
        if part != path:
            tensors |= {name: (part, tensor) for name, tensor in read_gguf(part).tensors.items()}
    return GgufSide(path, first.metadata, tensors)


def plan_conversion(reference: Path, task: Task | None, *, projector: bool) -> tuple[Planned, Planned | None]:
    """What converting the reference would write: the language model's file and, if wanted, the projector's."""
    mmproj = "f16" if projector else NO_PROJECTOR
    job = prepare_conversion(
        ConvertOptions(model=str(reference), output=None, outtypes=(_PLANNED_TYPE,), mmproj=mmproj, task=task)
    )
    language, *others = sorted((_planned(file) for file in job.files), key=lambda each: each.file.role != MODEL)
    return language, others[0] if others else None


def _planned(file: PlannedFile) -> Planned:
    return Planned(file, _parsed(file).metadata)


def _parsed(file: PlannedFile) -> GgufFile:
    return parse_gguf(_HeaderBytes(file.layouts[0].file_name, file.layouts[0].nbytes, file.layouts[0].header))


@dataclass(frozen=True)
class _HeaderBytes:
    """A file of which only the header exists."""

    name: str
    size: int
    header: bytes

    @property
    def chunk(self) -> int:
        return len(self.header)

    def read(self, offset: int, nbytes: int) -> bytes:
        return self.header[offset : offset + nbytes]
