"""A checkpoint on the Hub as a folder of this disk that lacks nothing but the weights: small files and headers."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Final

from qtool.storage.checkpoint import INDEX, MAX_HEADER, SIDECAR_PATTERNS, SINGLE
from qtool.storage.hub_repository import HubRepository, entry_of
from qtool.storage.hub_weights import HubWeights

# Of each weight file only the header is fetched. The rest is a hole in a sparse file of the right size, so that the
# reader of local checkpoints can check headers, sizes and index; weights are read from the Hub.

CHECKPOINT_FILES: Final = (
    "config.json",
    "*.safetensors",
    INDEX,
    "hf_quant_config.json",
    "qtool.json",
    "rerank_template.jinja",
    "adapter_config.json",  # engines read these two kinds, so that a checkpoint is not the same without them
    "*.py",
    *(pattern.replace("**/", "") for pattern in SIDECAR_PATTERNS),  # the Hub's `*` matches slashes too
)
"""Patterns of all that a checkpoint consists of."""

_CONFIGS: Final = (
    "config.json",
    INDEX,
    "hf_quant_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
)
_CHUNK: Final = 256 << 10
"""Larger than the header of a 2B model, so that one request suffices."""
_LARGE: Final = 256 << 10
"""The files of a tokenizer are larger, up to 11 MB; they are fetched only where they differ from the other side's."""
_LARGE_NAMES: Final = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_REQUESTS: Final = 8


class HubFolder:
    """The folder of a checkpoint in `repository`; it goes when nobody holds this any longer.

    Large side files come with `fetch_large`, once it is known whether the other side of a comparison has the same.
    """

    def __init__(self, repository: HubRepository) -> None:
        self.repository = repository
        self.path = Path(tempfile.mkdtemp(prefix="qtool-"))
        self._linked_to: HubFolder | None = None
        self._removed = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        small = [name for name in side_files(repository) if not _is_large(repository, name)]
        _write(repository, self.path, small)
        _mirror_headers(repository, self.path)

    @cached_property
    def weights(self) -> HubWeights:
        """Its weights."""
        return HubWeights(self.repository)

    def fetch_large(self, other: Path | HubFolder | None = None) -> None:
        """Fetch the large side files too, but for those that the checkpoint `other` has with the same bytes.

        What another folder has is linked to. If all files of the tokenizer are the same in two repositories, neither
        needs any of the large ones.
        """
        large = [name for name in side_files(self.repository) if _is_large(self.repository, name)]
        wanted = [name for name in large if not (self.path / name).exists()]
        if isinstance(other, Path):
            wanted = [name for name in wanted if not self._linked(name, other / name)]
        elif other is not None:
            if all(self._is_shared(name, other) for name in _TOKENIZER):
                wanted = [name for name in wanted if not self._is_same(name, other)]
            for name in [name for name in wanted if self._is_same(name, other) and (other.path / name).exists()]:
                (self.path / name).symlink_to((other.path / name).resolve())
                self._linked_to = other  # which must not go before this
                wanted.remove(name)
        _write(self.repository, self.path, wanted)

    def _is_shared(self, name: str, other: HubFolder) -> bool:
        """Whether both repositories have the same file of that name, or neither has any."""
        mine, theirs = (name in folder.repository.entries for folder in (self, other))
        return self._is_same(name, other) if mine and theirs else mine == theirs

    def _is_same(self, name: str, other: HubFolder) -> bool:
        identity = self.repository.entries[name].identity
        return (
            identity is not None
            and name in other.repository.entries
            and identity == other.repository.entries[name].identity
        )

    def _linked(self, name: str, local: Path) -> bool:
        entry = self.repository.entries[name]
        if entry.identity is None or not local.is_file() or local.stat().st_size != entry.size:
            return False
        if entry.identity not in {each.identity for each in entry_of(local.read_bytes())}:
            return False
        (self.path / name).symlink_to(local.resolve())
        return True


def mirror_configs(repository: HubRepository, folder: Path) -> None:
    """Write the files that describe `repository`'s checkpoint, and the headers of its weights, into the empty `folder`."""
    _write(repository, folder, [n for n in repository.names if any(fnmatchcase(n, each) for each in _CONFIGS)])
    _mirror_headers(repository, folder)


def side_files(repository: HubRepository) -> list[str]:
    """All files of the repository's checkpoint but the weights."""
    wanted = [name for name in repository.names if any(fnmatchcase(name, each) for each in CHECKPOINT_FILES)]
    return [name for name in wanted if not name.endswith(".safetensors")]


def weight_files(repository: HubRepository, folder: Path) -> Sequence[str]:
    """The weight files that exist; the reader checks that the index in `folder` names no others."""
    names = {SINGLE}
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_bytes()).get("weight_map", {})
            names = {str(name) for name in weight_map.values()}
        except (ValueError, AttributeError, RecursionError):
            names = set()  # the reader reports what is wrong with it
    return sorted(name for name in names.intersection(repository.names) if Path(name).name == name)


def cached_file(repository: HubRepository, name: str) -> Path | None:
    """The file in huggingface_hub's cache, of this very commit; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.repo, name, revision=repository.revision)
    return Path(found) if isinstance(found, str) else None


def _is_large(repository: HubRepository, name: str) -> bool:
    size = repository.entries[name].size
    return name in _LARGE_NAMES if size is None else size > _LARGE


def _write(repository: HubRepository, folder: Path, names: Iterable[str]) -> None:
    """Write whole files into `folder`, several at a time; those in the cache are linked to."""

    def write(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cached = cached_file(repository, name)
        if cached is None:
            (folder / name).write_bytes(repository.read_whole(name))
        else:
            (folder / name).symlink_to(cached.resolve())

    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(write, names))


def _mirror_headers(repository: HubRepository, folder: Path) -> None:
    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(lambda name: _mirror_header(repository, name, folder / name), weight_files(repository, folder)))


def _mirror_header(repository: HubRepository, name: str, path: Path) -> None:
    source = repository.open(name, _CHUNK)
    prefix = source.read(0, 8)
    length = int.from_bytes(prefix, "little")
    with path.open("wb") as file:
        file.truncate(source.size)
        file.write(source.read(0, 8 + length) if length <= MAX_HEADER else prefix)
