"""A checkpoint on the hub as a folder of its headers: the small files whole, of each weight file the header alone.

Rule: what was not fetched is a hole in a sparse file of the right size, so that the reader for checkpoints on disk checks
headers, sizes and index of a remote one too; nobody may read a weight from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from qtool.checkpoint.reader import INDEX, MAX_HEADER, SINGLE
from qtool.checkpoint.remote import HubRepository

_SMALL: Final = (
    "config.json", INDEX, "hf_quant_config.json", "tokenizer_config.json", "chat_template.jinja",
    "modules.json", "config_sentence_transformers.json", "[0-9]_*/config.json",
)  # fmt: skip
_CHUNK: Final = 256 << 10
"""Larger than the header of a 2B model, so that one request is enough."""


def mirror_headers(repository: HubRepository, folder: Path) -> None:
    """Write everything but the weights of `repository`'s checkpoint into the empty `folder`."""
    for name in repository.names:
        if any(fnmatchcase(name, pattern) for pattern in _SMALL):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(repository.read_whole(name))
    for name in _weight_files(repository, folder):
        _mirror_header(repository, name, folder / name)


def _weight_files(repository: HubRepository, folder: Path) -> Iterable[str]:
    """The weight files that there are; whether these are all that the index names is the reader's to check."""
    names = {SINGLE}
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_bytes()).get("weight_map", {})
            names = {str(name) for name in weight_map.values()}
        except (ValueError, AttributeError):
            names = set()  # the reader explains what is wrong with it
    return sorted(name for name in names.intersection(repository.names) if Path(name).name == name)


def _mirror_header(repository: HubRepository, name: str, path: Path) -> None:
    source = repository.open(name, _CHUNK)
    prefix = source.read(0, 8)
    length = int.from_bytes(prefix, "little")
    with path.open("wb") as file:
        file.truncate(source.size)
        file.write(source.read(0, 8 + length) if length <= MAX_HEADER else prefix)
