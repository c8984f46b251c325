"""An artefact, opened once: where it lies, its checkpoint or its GGUF model with projector, its family and its task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

from gguf.constants import PoolingType

from qtool.arch.detect import Detection, detect
from qtool.arch.families import gguf_families
from qtool.arch.family import Family
from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.jsonfile import read_json
from qtool.storage.checkpoint import Checkpoint, open_checkpoint
from qtool.storage.gguf_model import (
    PROJECTOR,
    PROJECTOR_NAME,
    RANK_HEAD,
    RERANK_KEY,
    GgufModel,
    is_gguf,
    is_projector,
    model_files,
    open_gguf_file,
    open_gguf_model,
)
from qtool.storage.hub import Source, resolve
from qtool.storage.location import ArtefactLocation, LocalLocation

CONFIG: Final = "config.json"
_DEEPSTACK: Final = re.compile(r"v\.deepstack\.\d+\.fc1\.weight")

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointArtefact:
    """A safetensors checkpoint on this disk; `asked_task` overrides what it declares. Nothing is read before it is needed."""

    source: Source
    asked_task: Task | None = None

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.source.directory

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Config and headers. Raises ModelError."""
        return open_checkpoint(self.path)

    @cached_property
    def detection(self) -> Detection:
        """Architecture and task. Raises ModelError."""
        return detect(self.path, self.asked_task)

    @property
    def family(self) -> Family:
        """The family of its architecture. Raises ModelError."""
        return self.detection.family

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """What tokenizer.json says, which is large enough to be read only once. Raises ModelError."""
        tokenizer: Mapping[str, Any] = read_json(self.path / "tokenizer.json")
        return tokenizer


@dataclass(frozen=True)
class GgufArtefact:
    """A GGUF model: the `files` of its language model in `location`, and the projector that goes with it.

    `mmproj` is the projector's file where the user names one. Nothing is read before it is needed.
    """

    location: ArtefactLocation
    files: Sequence[str]
    asked_task: Task | None = None
    mmproj: Path | None = None

    @property
    def path(self) -> Path:
        """The language model's file, of a split one the first part."""
        return Path(self.location.path_of(self.files[0]))

    @cached_property
    def model(self) -> GgufModel:
        """The language model's headers. Raises ModelError."""
        return open_gguf_model(self.location, self.files)

    @property
    def family(self) -> Family | None:
        """The family that its architecture names; None of an unknown one."""
        return gguf_families().get(self.model.architecture or "")

    @cached_property
    def candidates(self) -> Sequence[ProjectorCandidate]:
        """The files that may be its projector."""
        if self.mmproj is not None:
            return [ProjectorCandidate(self.mmproj.name, open_gguf_file(self.mmproj))]
        return [*projectors_beside(self.location, self.model.name)]

    @cached_property
    def projector(self) -> GgufModel | None:
        """The projector that was named, else the one that fits; None of a model that reads text only.

        Raises UsageError where several fit and none bears the model's name.
        """
        if self.mmproj is not None:
            return self.candidates[0].file
        fitting = fitting_projectors(self.model, self.family, self.candidates)
        names = [each.name for each in fitting]
        if not fitting:
            return None
        return _only(fitting, names, f"{self.path.parent} holds {{}} projectors", "Choose one with --mmproj.")

    @property
    def models(self) -> tuple[GgufModel, ...]:
        """The language model and, where there is one, the projector."""
        return (self.model, self.projector) if self.projector else (self.model,)


Artefact = CheckpointArtefact | GgufArtefact


def open_artefact(
    target: str,
    *,
    task: Task | None = None,
    mmproj: Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Artefact:
    """Find `target`: a GGUF file, a folder, a built-in demo model, or a repository on the hub, which is downloaded.

    `task` overrides what a checkpoint declares. Raises UsageError for a target that is none of these or several.
    """
    path = Path(target)
    if is_gguf(target):
        if not path.is_file():
            raise UsageError(f"There is no file {path}.", "Pass a GGUF file or a folder on this disk.")
        location = LocalLocation(path.parent, path.name)
        return GgufArtefact(location, next(iter(model_files(location.names, path.name).values())), task, mmproj)
    source = resolve(target, revision, token)
    if not (source.directory / CONFIG).is_file():
        location = LocalLocation(source.directory)
        return GgufArtefact(location, _language_files(location, source.directory), task, mmproj)
    if mmproj is not None:
        raise UsageError(f"{target} is a checkpoint and takes no projector.", "Leave out --mmproj.")
    return CheckpointArtefact(source, task)


def _language_files(location: LocalLocation, folder: Path) -> Sequence[str]:
    """The parts of the one language model in a folder: of the highest level that has any."""
    models = {name: files for name, files in model_files(location.names).items() if not is_projector(name)}
    if not models:
        raise ModelError(
            f"{folder} holds neither {CONFIG} nor GGUF language models.", "Pass a checkpoint's folder or a GGUF file."
        )
    level = min(name.count("/") for name in models)
    models = {name: files for name, files in models.items() if name.count("/") == level}
    if len(models) > 1:
        models = {name: files for name, files in models.items() if not _holds_projector(location, files)}
    names = [files[0] for files in models.values()]
    return _only(
        list(models.values()), names, f"{folder} holds {{}} language models", f"Name the file: {folder}/….gguf."
    )


def _holds_projector(location: ArtefactLocation, files: Sequence[str]) -> bool:
    """Whether a file that is not named as a projector is one by its architecture."""
    try:
        return open_gguf_model(location, files).architecture == PROJECTOR
    except ModelError:
        return False


def _only(found: Sequence[T], names: Sequence[str], what: str, hint: str) -> T:
    if len(found) != 1:
        raise UsageError(f"{what.format(len(found))}, not one: {', '.join(names) or 'none'}.", hint)
    return found[0]


def require_family(model: GgufModel) -> Family:
    """The family that a model's architecture names, or a ModelError that lists the known ones."""
    known, architecture = gguf_families(), model.architecture
    if architecture is None or architecture not in known:
        raise ModelError(f"{model.target} has the architecture {architecture!r}; expected {' or '.join(known)}.")
    return known[architecture]


# What a GGUF model is for, by its own fields. A file's name never counts.


def declared_task(model: GgufModel) -> tuple[Task | None, str]:
    """The task that the model's fields declare, and the one that says so; None where none does."""
    return next(_declared_tasks(model), (None, "nothing declares it"))


def _declared_tasks(model: GgufModel) -> Iterator[tuple[Task, str]]:
    """Every sign of a task, the surest first: only a reranker has a head, embedders have nothing but a pooling type."""
    labels, pooling = model.key("classifier.output_labels"), model.key("pooling_type")
    for sign, holder in ((RANK_HEAD, model.tensors), (RERANK_KEY, model.metadata), (labels, model.metadata)):
        if sign in holder:
            yield Task.RERANK, sign
    declared = model.integer(pooling)
    if declared == PoolingType.RANK:
        yield Task.RERANK, f"{pooling} = {declared} (RANK)"
    elif declared in (PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST):
        yield Task.EMBED, f"{pooling} = {declared} ({PoolingType(declared).name})"


# The projector of a language model. No file says which model it belongs to: it fits if its type is the family's, its
# vectors are as wide as the model's and it feeds as many layers. A file that merely lies beside the model and does not
# fit, or cannot be read, is passed over.


@dataclass(frozen=True)
class ProjectorCandidate:
    """A file that may be a projector; `file` is None where it cannot be read, and `problem` says why."""

    name: str
    file: GgufModel | None
    problem: str = ""


def projectors_beside(
    location: ArtefactLocation, model_name: str, opened: Mapping[str, GgufModel] | None = None
) -> Iterator[ProjectorCandidate]:
    """The files in the model's folder, or in the location's own, that are named as projectors are.

    `opened` are models of the location whose headers have been read already.
    """
    folder = PurePosixPath(model_name).parent
    for name, files in model_files([name for name in location.names if is_projector(name)]).items():
        if name != model_name and PurePosixPath(name).parent in (folder, PurePosixPath()):
            try:
                yield ProjectorCandidate(name, (opened or {}).get(name) or open_gguf_model(location, files))
            except ModelError as error:
                yield ProjectorCandidate(name, None, str(error))


def fitting_projectors(
    model: GgufModel, family: Family | None, candidates: Iterable[ProjectorCandidate]
) -> list[GgufModel]:
    """Those that fit the model; of several the one that bears its name, as qtool names what it converts together."""
    read = [each.file for each in candidates if each.file is not None]
    fitting = [file for file in read if family is not None and not misfit(file, model, family)]
    own = f"{PROJECTOR_NAME}-{PurePosixPath(model.name).name}".lower()
    return [file for file in fitting if PurePosixPath(file.name).name.lower() == own] or fitting


def misfit(projector: GgufModel, model: GgufModel, family: Family) -> str:
    """Why a projector does not fit a language model, as a sentence; empty where it does."""
    if projector.architecture != PROJECTOR:
        return f"{projector.target} is no projector: its architecture is {projector.architecture!r}."
    if family.vision is None:
        return f"{model.target} reads text only and takes no projector."
    found, expected = projector_type(projector), family.vision.projector_type
    if found != expected:
        return f"{projector.target} is a projector of type {found!r}; {model.target} takes {expected!r}."
    width = projector.integer("clip.vision.projection_dim")
    layers = sum(bool(_DEEPSTACK.fullmatch(name)) for name in projector.tensors)  # llama.cpp goes by the tensors
    wanted = model.integer(model.key("embedding_length")), model.integer(model.key("n_deepstack_layers")) or 0
    if (width, layers) != wanted:
        return (
            f"{projector.target} gives vectors of {width} from {layers} deepstack layers; "
            f"{model.target} reads {wanted[0]} from {wanted[1]}."
        )
    return ""


def projector_type(projector: GgufModel) -> str:
    """Which family's projector a file is, by its own word."""
    keys = ("clip.projector_type", "clip.vision.projector_type")
    return next((text for key in keys if (text := projector.text(key))), "unknown")


def require_fit(projector: GgufModel, model: GgufModel, family: Family) -> None:
    """Raise ModelError where a projector does not fit."""
    if problem := misfit(projector, model, family):
        raise ModelError(problem, "Pass the projector that was converted with this model.")
