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
from qtool.errors import ModelError, NetworkError, UsageError
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.storage.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from qtool.storage.gguf import read_architecture
from qtool.storage.gguf_model import (
    PROJECTOR,
    PROJECTOR_NAME,
    RANK_HEAD,
    RERANK_KEY,
    GgufModel,
    is_gguf,
    is_projector,
    missing_parts,
    model_files,
    open_gguf_file,
    open_gguf_model,
)
from qtool.storage.hub import SCHEME, Source, by_range, download_files, open_repository, resolve, snapshot
from qtool.storage.hub_repository import HubRepository
from qtool.storage.location import (
    ArtefactLocation,
    HubLocation,
    LocalLocation,
    hub_address,
    is_on_this_disk,
    local_location,
)

CONFIG: Final = "config.json"
_FIRST_FIELDS: Final = 64 << 10
_DEEPSTACK: Final = re.compile(r"v\.deepstack\.\d+\.fc1\.weight")

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointArtefact:
    """A safetensors checkpoint; `asked_task` overrides what it declares. Nothing is read before it is needed."""

    source: Source
    asked_task: Task | None = None

    @property
    def path(self) -> Path:
        """Its folder, which lacks the weights where they are read from the hub."""
        return self.source.directory

    @property
    def target(self) -> str:
        """How messages name it."""
        return self.source.origin if self.source.remote else str(self.path)

    @property
    def revision(self) -> str | None:
        """The commit of a repository on the hub."""
        return self.source.revision

    @cached_property
    def location(self) -> ArtefactLocation:
        """Where all its files lie."""
        remote = self.source.remote
        return HubLocation(remote.repository) if remote else LocalLocation(self.path, revision=self.source.revision)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Config and headers. Raises ModelError."""
        with self.source.named_errors():
            return open_checkpoint(self.path, self.source.remote.weights if self.source.remote else None)

    @cached_property
    def detection(self) -> Detection:
        """Architecture and task. Raises ModelError."""
        with self.source.named_errors():
            return detect(self.path, self.asked_task)

    def fetch_side_files(self) -> None:
        """Fetch what is not here of the small files, where the checkpoint is read by range."""
        if self.source.remote is not None:
            self.source.remote.fetch_large()

    @property
    def family(self) -> Family:
        """The family of its architecture. Raises ModelError."""
        return self.detection.family

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """What tokenizer.json says, which is large enough to be read only once. Raises ModelError."""
        with self.source.named_errors():
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

    @property
    def target(self) -> str:
        """How messages name it."""
        return self.location.path_of(self.files[0])

    @property
    def revision(self) -> str | None:
        """The commit of a repository on the hub."""
        return self.location.revision

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
            name = self._name_of(self.mmproj)
            chosen = open_gguf_file(self.mmproj) if name is None else open_gguf_model(self.location, [name])
            return [ProjectorCandidate(self.mmproj.name, chosen)]
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
        place = self.path.parent if self.location.is_local else self.location.path_of("")
        return _only(fitting, names, f"{place} holds {{}} projectors", "Choose one with --mmproj.")

    @property
    def has_candidates(self) -> bool:
        """Whether there is any file that may be its projector; reads nothing."""
        return self.mmproj is not None or any(map(is_projector, self.location.names))

    def _name_of(self, mmproj: Path) -> str | None:
        """The file of the repository that `mmproj` names; None of one on this disk."""
        if self.location.is_local or mmproj.is_file():
            return None
        name = str(mmproj).removeprefix(f"{Path(self.location.path_of(''))}/")
        return name if name in self.location.names else None

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
    headers_only: bool = False,
) -> Artefact:
    """Find `target`: a GGUF file, a folder, a built-in demo model, or on the hub a repository or a GGUF file of one.

    From the hub come only the model's own files and its projector's, or with `headers_only` just their headers. `task`
    overrides what a checkpoint declares. Raises UsageError for a target that is none of these or several.
    """
    location = _located(target, revision, token)
    if location.selected is None and is_checkpoint(location):
        if mmproj is not None:
            raise UsageError(f"{target} is a checkpoint and takes no projector.", "Leave out --mmproj.")
        return CheckpointArtefact(_source(target, location, headers_only=headers_only), task)
    opened = GgufArtefact(location, _selected_files(target, location), task, mmproj)
    if headers_only or not isinstance(location, HubLocation):
        return opened
    return _downloaded(opened, location.repository)


def fetch_large_files(artefact: Artefact, reference: CheckpointArtefact) -> None:
    """Give checkpoints that are read by range the large side files in which they differ: a tokenizer has up to 11 MB."""
    sides = [each for each in (artefact, reference) if isinstance(each, CheckpointArtefact)]
    for side in sides:
        other = next((each for each in sides if each is not side), None)
        if side.source.remote is not None:
            side.source.remote.fetch_large((other.source.remote or other.path) if other else None)


def artefacts_of(target: str, revision: str | None = None, token: str | None = None) -> list[str]:
    """The targets of all language models in a folder or repository of GGUF files; else the target itself."""
    if not target.startswith(SCHEME) and (is_gguf(target) or Path(target).is_file()):
        return [target]
    location = _located(target, revision, token)
    if location.selected is not None or is_checkpoint(location):
        return [target]
    models = language_models(location)
    if len(models) < 2:
        return [target]
    place = target if location.is_local else hub_address(target).target
    return [f"{place.rstrip('/')}/{files[0]}" for files in models.values()]


def _located(target: str, revision: str | None, token: str | None) -> LocalLocation | HubLocation:
    """Where a target lies; in the cache where the hub cannot be reached."""
    if is_on_this_disk(target):
        return local_location(target, revision)
    if is_gguf(target) and not target.startswith(SCHEME):
        raise UsageError(f"There is no file {target}.", "Pass a GGUF file or a folder on this disk.")
    address = hub_address(target, revision)
    repository = open_repository(address.repo, address.revision, token)
    if repository is not None:
        return HubLocation(repository, address.file)
    folder = snapshot(address.repo, address.revision, token, ["*"], only_cached=True)
    if address.file is not None and not (folder / address.file).is_file():
        raise NetworkError(
            f"{target} is not in the cache, and the Hub cannot be reached.", "Download it first, or check the network."
        )
    return LocalLocation(folder, address.file, folder.name)


def is_checkpoint(location: ArtefactLocation) -> bool:
    """Whether a place holds a checkpoint: many repositories of GGUF files have a config.json beside them."""
    names = set(location.names)
    return CONFIG in names and (bool({SINGLE, INDEX} & names) or not any(map(is_gguf, names)))


def language_models(location: ArtefactLocation) -> dict[str, list[str]]:
    """The files of each language model of a place: of the highest level that has any."""
    models = {name: files for name, files in model_files(location.names).items() if not is_projector(name)}
    level = min((name.count("/") for name in models), default=0)
    models = {name: files for name, files in models.items() if name.count("/") == level}
    if len(models) > 1:
        models = {name: files for name, files in models.items() if not _holds_projector(location, files[0])}
    return models


def _source(target: str, location: LocalLocation | HubLocation, *, headers_only: bool) -> Source:
    if isinstance(location, HubLocation):
        repository = location.repository
        if headers_only:
            return by_range(repository)
        return resolve(repository.repo, repository.asked_revision, repository.token)
    if location.revision is None:
        return resolve(target)
    return Source(Path(location.path_of("")), f"{SCHEME}{hub_address(target).repo}", location.revision)


def _selected_files(target: str, location: ArtefactLocation) -> Sequence[str]:
    """The parts of the language model that a target names, or of the only one that it holds."""
    if location.selected is not None:
        if not is_gguf(location.selected):
            raise UsageError(f"{target} is not a GGUF file.", "Name a .gguf file, or what holds it.")
        return next(iter(model_files(location.names, location.selected).values()))
    models = language_models(location)
    if not models:
        raise ModelError(
            f"{target} holds neither {CONFIG} nor GGUF language models.", "Pass a checkpoint or a GGUF file."
        )
    names = [files[0] for files in models.values()]
    place = target.rstrip("/") if target.startswith(SCHEME) or location.is_local else f"{SCHEME}{target}"
    return _only(
        list(models.values()), names, f"{target} holds {{}} language models", f"Name the file: {place}/….gguf."
    )


def _downloaded(remote: GgufArtefact, repository: HubRepository) -> GgufArtefact:
    """The artefact once its files, its projector's and its manifest are in huggingface_hub's cache, and nothing else."""
    if missing := missing_parts(remote.files):
        raise ModelError(
            f"{SCHEME}{repository.repo} lacks {missing[0]}, a part of the model.", "Ask its publisher for all parts."
        )
    projector = remote.projector if remote.has_candidates else None
    names = [*remote.files]
    if projector is not None and projector.location is remote.location:
        names += projector.parts
    names += [name for name in manifests_of(remote.files[0]) if name in repository.names]
    folder = download_files(repository, names)
    mmproj = remote.mmproj
    if mmproj is not None and projector is not None and projector.location is remote.location:
        mmproj = folder / next(iter(projector.parts))
    location = LocalLocation(folder, remote.files[0], repository.revision, names)
    return GgufArtefact(location, remote.files, remote.asked_task, mmproj)


def manifests_of(file: str) -> list[str]:
    """Where the manifest of a GGUF file may lie, by names relative to the same place."""
    path = PurePosixPath(file)
    return [f"{file}.{MANIFEST}", (path.parent / MANIFEST).as_posix()]


def _holds_projector(location: ArtefactLocation, file: str) -> bool:
    """Whether a file that is not named as a projector is one by its architecture."""
    try:
        with location.open(file, _FIRST_FIELDS) as source:
            return read_architecture(source) == PROJECTOR
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
