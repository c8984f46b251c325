"""Where a checkpoint comes from: a folder, a built-in demo model, or the Hub, downloaded whole or read by range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from shutil import disk_usage
from typing import Final

from qtool import resources
from qtool.errors import NetworkError, QtoolError, UsageError
from qtool.storage.hub_folder import CHECKPOINT_FILES, HubFolder, cached_file, weight_files
from qtool.storage.hub_repository import HubRepository, explained, is_offline

# Whatever the form of a model, the rest of qtool gets a folder.

SCHEME: Final = "hf://"
_FILES: Final = (".gguf", ".safetensors", ".json", ".jsonl")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `revision` is the commit of a Hub repository, None for a folder.

    Of a checkpoint that is read by range, `remote` has the weights, which `directory` lacks.
    """

    directory: Path
    origin: str
    revision: str | None = None
    remote: HubFolder | None = None

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Errors in the block name the repository where they would name the folder of its headers."""
        try:
            yield
        except QtoolError as error:
            if self.remote is None or str(self.directory) not in error.message:
                raise
            raise type(error)(error.message.replace(str(self.directory), self.origin), error.hint) from error


def resolve(model: str, revision: str | None = None, token: str | None = None) -> Source:
    """The checkpoint `model`, whole: a folder, a built-in demo model, `org/name` or `hf://org/name@revision`."""
    return _local(model, revision) or _downloaded(*_repository(model, revision), token)


def resolve_by_range(model: str, revision: str | None = None, token: str | None = None) -> Source:
    """The same without the weights of a repository; large side files are left to `remote.fetch_large`."""
    found = _local(model, revision)
    if found is not None:
        return found
    repo, revision = _repository(model, revision)
    repository = open_repository(repo, revision, token)
    return by_range(repository) if repository is not None else _downloaded(repo, revision, token)


def resolve_for_export(
    model: str, revision: str | None, token: str | None, *, stream: bool | None, dry_run: bool, output: Path | None
) -> Source:
    """The checkpoint that an artefact is made from: by range with `stream`, downloaded without.

    For None it is downloaded, unless it is not in the cache and the disk is too short for it and what it becomes. A dry
    run needs no weights.
    """
    found = _local(model, revision)
    if found is not None:
        if stream:
            raise UsageError(
                f"{model} is on this disk; --stream applies to Hub repositories only.", "Leave out --stream."
            )
        return found
    repo, revision = _repository(model, revision)
    if stream is False and not dry_run:
        return _downloaded(repo, revision, token)
    repository = open_repository(repo, revision, token, must_answer=bool(stream))
    if repository is None or not (stream or dry_run or _is_disk_short(repository, output)):
        return _downloaded(repo, revision, token)
    source = by_range(repository)
    if source.remote is not None:
        source.remote.fetch_large()
    return source


def by_range(repository: HubRepository) -> Source:
    """The checkpoint of a repository without its weights, which are read by range."""
    folder = HubFolder(repository)
    return Source(folder.path, f"{SCHEME}{repository.repo}", repository.revision, folder)


def open_repository(
    repo: str, revision: str | None, token: str | None, *, must_answer: bool = False
) -> HubRepository | None:
    """The repository, or None where the Hub cannot be reached and what the cache holds must do."""
    if is_offline() and not must_answer:
        return None
    try:
        return HubRepository(repo, revision, token)
    except NetworkError as error:
        if must_answer or not _is_unreachable(error):
            raise
        return None


def _is_unreachable(error: NetworkError) -> bool:
    import httpx

    return isinstance(error.__cause__, httpx.TransportError)


def _local(model: str, revision: str | None) -> Source | None:
    """A folder or a demo model; None for anything else."""
    if not model.startswith(SCHEME) and Path(model).is_dir():
        if revision is not None:
            raise UsageError(
                f"{model} is a local folder; --revision applies to Hub repositories only.",
                "Remove --revision, or write hf://org/name.",
            )
        return Source(Path(model), Path(model).resolve().name)
    return Source(resources.demo_model(model), model) if model in resources.demo_models() else None


def _repository(model: str, revision: str | None) -> tuple[str, str | None]:
    repo, _, in_name = model.removeprefix(SCHEME).partition("@")
    if in_name and revision not in (None, in_name):
        raise UsageError(f"{model} and --revision {revision} name different revisions.", "Remove one of them.")
    parts = repo.split("/")
    if len(parts) != 2 or not all(parts) or is_path(model):
        raise UsageError(
            f"Not a local folder or a Hub repository: {model!r}.", "Pass a folder, org/name or hf://org/name@revision."
        )
    return repo, in_name or revision


def is_path(target: str) -> bool:
    """Whether a target that does not exist locally is a mistyped path: it cannot be an `org/name` on the Hub."""
    if target.startswith(SCHEME):
        return False
    path = Path(target)
    is_local = target.startswith((".", "~", "/")) or (len(path.parts) > 1 and Path(path.parts[0]).exists())
    return is_local or path.suffix in _FILES or target.count("/") != 1


def _downloaded(repo: str, revision: str | None, token: str | None) -> Source:
    directory = snapshot(repo, revision, token, CHECKPOINT_FILES)
    return Source(directory, f"{SCHEME}{repo}", directory.name)


def snapshot(
    repo: str, revision: str | None, token: str | None, patterns: Sequence[str], *, only_cached: bool = False
) -> Path:
    """The folder of a commit in huggingface_hub's cache, with the files that `patterns` name, if need be downloaded.

    With `only_cached` some of them may be missing. Raises QtoolError.
    """
    from huggingface_hub import snapshot_download

    from qtool.transfer import hub_session

    hub_session()
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, token=token, allow_patterns=list(patterns), local_files_only=only_cached
            )
        )
    except Exception as error:  # the errors of huggingface_hub share no base class below Exception
        incomplete = getattr(error, "snapshot_path", None)
        if only_cached and incomplete is not None:
            return Path(incomplete)
        raise explained(error, repo, revision) from error


def download_files(repository: HubRepository, names: Sequence[str]) -> Path:
    """The folder in huggingface_hub's cache that holds these files of the repository."""
    folder = snapshot(repository.repo, repository.asked_revision, repository.token, [escape(name) for name in names])
    if folder.name != repository.revision:
        raise repository.changed(names[0])
    return folder


def _is_disk_short(repository: HubRepository, output: Path | None) -> bool:
    """Whether the cache's disk cannot hold what is missing of the checkpoint; with the output, too, if it goes there."""
    from huggingface_hub import constants

    weights = [name for name in repository.names if name.endswith(".safetensors")] or weight_files(repository, Path())
    sizes = {name: repository.entries[name].size or 0 for name in weights}
    missing = sum(size for name, size in sizes.items() if cached_file(repository, name) is None)
    cache = _existing(Path(constants.HF_HUB_CACHE))
    usage = disk_usage(cache)
    beside = output is not None and _existing(output).stat().st_dev == cache.stat().st_dev
    return missing > 0 and usage.free < missing + (sum(sizes.values()) if beside else 0)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
