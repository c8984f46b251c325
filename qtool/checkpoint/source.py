"""Where a checkpoint comes from: a folder, the hub, or the models that come with qtool.

Rule: whatever the form, the rest of qtool sees a folder and where it came from, with the commit it stands at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qtool import resources
from qtool.checkpoint.sidecars import SIDECAR_PATTERNS
from qtool.errors import ModelError, NetworkError, QtoolError, UsageError

_SCHEME: Final = "hf://"
_FILES: Final = (".gguf", ".safetensors", ".json", ".jsonl")
_WANTED: Final = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "hf_quant_config.json",
    "qtool.json",
    *(pattern.replace("**/", "") for pattern in SIDECAR_PATTERNS),  # the hub's `*` crosses folders by itself
)


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk. `revision` is the commit sha of a hub repository, None for a folder."""

    directory: Path
    origin: str
    revision: str | None = None


def resolve(model: str, revision: str | None = None, token: str | None = None) -> Source:
    """Find `model` (a folder, a built-in demo model, `org/name` or `hf://org/name@revision`), downloading if need be."""
    if not model.startswith(_SCHEME) and Path(model).is_dir():
        if revision is not None:
            raise UsageError(
                f"{model} is a folder and has no revisions.", "Leave --revision out, or write hf://org/name."
            )
        return Source(Path(model), Path(model).resolve().name)
    if model in resources.demo_models():
        return Source(resources.demo_model(model), model)
    repo, revision = _repository(model, revision)
    directory = _download(repo, revision, token)
    return Source(directory, f"{_SCHEME}{repo}", directory.name)


def _repository(model: str, revision: str | None) -> tuple[str, str | None]:
    repo, _, in_name = model.removeprefix(_SCHEME).partition("@")
    if in_name and revision not in (None, in_name):
        raise UsageError(f"{model} names one revision and --revision another.")
    parts = repo.split("/")
    if len(parts) != 2 or not all(parts) or is_path(model):
        raise UsageError(
            f"{model} is no folder here and no repository.", "Pass a folder, org/name or hf://org/name@revision."
        )
    return repo, in_name or revision


def is_path(target: str) -> bool:
    """Whether a target that is not here is a mistyped path all the same, and no `org/name` for the hub to look for."""
    if target.startswith(_SCHEME):
        return False
    path = Path(target)
    begins_here = target.startswith((".", "~", "/")) or (len(path.parts) > 1 and Path(path.parts[0]).exists())
    return begins_here or path.suffix in _FILES or target.count("/") != 1


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's errors share no base class below Exception
        raise explained(error, repo, revision) from error


def explained(error: Exception, repo: str, revision: str | None) -> QtoolError:
    """An error of the hub's client in our words."""
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return NetworkError(
            f"{repo} is not on the hub, or it is private or gated.", "Check the name; set HF_TOKEN or pass --token."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NetworkError(f"{repo} has no revision {revision}.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hint = "HF_HUB_OFFLINE is set; unset it or fetch the model first." if offline else "Check the network."
        return NetworkError(f"{repo}{at} is not in the cache and the hub cannot be reached.", hint)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo} is no valid repository name.")
    if isinstance(error, OSError | errors.HfHubHTTPError):
        return NetworkError(f"{repo}{at} could not be fetched: {_first_line(error)}.")
    return ModelError(f"{repo}{at} could not be fetched: {type(error).__name__}: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
