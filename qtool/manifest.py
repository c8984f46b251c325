"""qtool.json: what an artefact is, what it was made from and how.

It holds hashes, versions, decisions and errors, but no date and no path: the same input gives the same manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

SCHEMA_VERSIONS: Final[Mapping[str, int]] = {"quantize": 1, "convert-gguf": 2, "repair-gguf": 2}
"""By kind. Version 1 of the GGUF kinds had, for a tensor of more than 64 MiB, a hash for each 64 MiB of it."""
FILE_NAME: Final = "qtool.json"


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions of qtool, Python and `packages`; None where one is absent."""
    return {
        "qtool": _version("qtool"),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def manifest(kind: str, **facts: Any) -> Mapping[str, Any]:
    """The contents of qtool.json for an artefact made by the command `kind`."""
    return {"schema_version": SCHEMA_VERSIONS[kind], "kind": kind, **facts}
