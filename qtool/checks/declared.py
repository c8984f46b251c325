"""What the manifest beside an artefact declares of its weights: by which algorithm they were rounded, and their checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.artefact import Artefact, GgufArtefact
from qtool.errors import QtoolError
from qtool.formats.nvfp4_checksums import Nvfp4Checksums
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.recipe import parse_recipe
from qtool.storage.atomic import manifest_of

CALIBRATED: Final = "calibrated"


@dataclass(frozen=True)
class RecordedWeight:
    """What the manifest has of one weight that was fitted to data.

    `relative_error` is |w - q| / |w| with four digits, `source_crc32` of the float32 values w, `checksums` of codes and
    block scales.
    """

    shape: tuple[int, int]
    relative_error: float
    global_scale: np.float32
    source_crc32: int
    checksums: Nvfp4Checksums


@dataclass(frozen=True)
class Declared:
    """`algorithm` is the recipe's, None where there is none; `weights` by the artefact's own tensor names."""

    algorithm: str | None = None
    weights: Mapping[str, RecordedWeight] = field(default_factory=dict)

    @property
    def is_calibrated(self) -> bool:
        """Whether the weights were fitted to data."""
        return self.algorithm == CALIBRATED


def manifest_facts(artefact: Artefact) -> Mapping[str, Any]:
    """The manifest in the artefact's folder, or beside its file; empty where there is none. Raises ModelError."""
    path = artefact.path
    places: Sequence[Path] = (path / MANIFEST,)
    if isinstance(artefact, GgufArtefact):
        places = (manifest_of(path), path.with_name(MANIFEST))
    manifest = next((place for place in places if place.is_file()), None)
    return read_json(manifest) if manifest else {}


def declared(artefact: Artefact) -> Declared:
    """What the manifest of `artefact` declares, as far as it can be read."""
    facts = manifest_facts(artefact)
    return Declared(
        algorithm=_algorithm(facts.get("recipe")),
        weights={name: weight for name, weight in map(_recorded, _entries(facts)) if weight is not None},
    )


def _algorithm(recipe: Any) -> str | None:
    try:
        return parse_recipe(str(recipe["text"])).recipe.algorithm
    except (QtoolError, KeyError, TypeError):
        return None


def _entries(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tensors = facts.get("tensors")
    return [each for each in tensors if isinstance(each, Mapping)] if isinstance(tensors, list) else []


def _recorded(entry: Mapping[str, Any]) -> tuple[str, RecordedWeight | None]:
    """The name and the numbers of one weight; None where any is missing or is none."""
    name = str(entry.get("gguf_name", entry.get("name")))
    try:
        rows, columns = (int(size) for size in entry["shape"])
        sums = Nvfp4Checksums.decoded(str(entry["checksums"]), (rows, columns))
        error, scale, source = float(entry["relative_error"]), np.float32(entry["global_scale"]), entry["source_crc32"]
    except (KeyError, TypeError, ValueError, OverflowError):
        return name, None
    if sums is None or not isinstance(source, int) or not (np.isfinite(error) and np.isfinite(scale)):
        return name, None
    return name, RecordedWeight((rows, columns), error, scale, source, sums)
