"""qtool.json: what an artefact is, what it was made from and how.

It holds hashes, versions, decisions and errors, but no date and no path: the same input gives the same manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import qtool

SCHEMA_VERSIONS: Final[Mapping[str, int]] = {"quantize": 1, "convert-gguf": 2, "repair-gguf": 2, "tune": 1}
"""By kind. Version 1 of the GGUF kinds had, for a tensor of more than 64 MiB, a hash for each 64 MiB of it."""
FILE_NAME: Final = "qtool.json"
PARTS: Final = (
    "numpy", "numba", "scipy", "gguf", "tokenizers", "huggingface_hub", "torch", "transformers", "nvidia-modelopt",
    "datasets", "xllamacpp", "av",
)  # fmt: skip
"""The packages that results depend on; `versions(*PARTS)` is what a bug report needs."""


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of qtool, Python and `packages` without importing them; None for one that is not installed."""
    return {
        "qtool": qtool.__version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
    }


def installed_version(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def manifest(kind: str, **facts: Any) -> Mapping[str, Any]:
    """The contents of qtool.json for an artefact made by the command `kind`."""
    return {"schema_version": SCHEMA_VERSIONS[kind], "kind": kind, **facts}
