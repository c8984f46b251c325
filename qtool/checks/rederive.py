"""Stage 2, to the byte: make the artefact again from the reference and compare.

Rule: bytes of tensors decide, since the same tensors may lie in other shards; the recipe is the artefact's own.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool.arch.spec import Task
from qtool.checks.findings import Finding, finding, listed
from qtool.checks.sides import GgufFiles, GgufSide, gguf_files, open_reference, read_side
from qtool.checks.stage import REDERIVE, RederivedFile, Stage, concluded, skipped
from qtool.errors import ModelError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import FILE_TYPES, NO_PROJECTOR, ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.progress import Progress, ignore
from qtool.resources import DEFAULT_RECIPE
from qtool.storage.checkpoint import INDEX, Checkpoint, open_checkpoint
from qtool.storage.hashing import sha256_of
from qtool.storage.packed import is_quantized

_CHUNK: Final = 4 << 20
_NAMES: Final = "general."

Made = tuple[list[Finding], list[RederivedFile], str]
"""What is to be said, the table, and by which recipe."""


def rederive(
    artefact: Path,
    reference: Path,
    workfolder: Path,
    task: Task | None = None,
    mmproj: Path | None = None,
    progress: Progress = ignore,
) -> tuple[Stage, tuple[RederivedFile, ...]]:
    """Make the artefact again in `workfolder` (which needs room for it) and compare hashes of files, else of tensors.

    Skipped for what llama.cpp quantized. Raises ModelError if the reference is broken.
    """
    started = time.monotonic()
    _, detection = open_reference(reference, task)
    rebuilder = _Rebuilder(reference, workfolder, detection.task, progress)
    files = gguf_files(artefact, mmproj)
    try:
        made = rebuilder.gguf(files) if files else rebuilder.checkpoint(artefact)
    except ModelError as error:
        made = [finding("unreadable", artefact, problem=str(error))], [], ""
    if made is None:
        return skipped(REDERIVE, "llama.cpp quantized the file, and its bytes depend on the machine."), ()
    findings, table, how = made
    equal = sum(each.is_equal for each in table)
    good = f"{artefact.name} is exactly {reference.name} {how}: {equal} of {len(table)} hashes are equal."
    return concluded(REDERIVE, started, findings, good), tuple(table)


@dataclass(frozen=True)
class _Rebuilder:
    reference: Path
    folder: Path
    task: Task | None
    progress: Progress

    def checkpoint(self, artefact: Path) -> Made:
        found = open_checkpoint(artefact)
        if not is_quantized(found.config):
            return _compared(artefact, found, self.reference, "as it is")
        recipe, name, findings = _recipe(artefact, self.folder)
        again = self._quantized(recipe)
        others, table, how = _compared(artefact, found, again, f"under the recipe {name}")
        shutil.rmtree(again)
        return [*findings, *others], table, how

    def gguf(self, files: GgufFiles) -> Made | None:
        sides = [read_side(path) for path in files.paths]
        kind = _type_of(sides[0])
        if kind is None:
            return None
        source = self._quantized(DEFAULT_RECIPE) if kind == "nvfp4" else self.reference
        output = self.folder / "converted"
        projector = (_type_of(sides[1]) or "f16") if len(sides) > 1 else NO_PROJECTOR
        options = ConvertOptions(model=str(source), output=output, outtypes=(kind,), mmproj=projector, task=self.task)
        convert_gguf(options, self.progress)
        made = gguf_files(output)
        findings: list[Finding] = []
        table: list[RederivedFile] = []
        for mine, again in zip(sides, made.paths if made else (), strict=False):
            findings += _compare_file(mine.path, mine, read_side(again), table)
        shutil.rmtree(output)
        return findings, table, f"as {kind.upper()}"

    def _quantized(self, recipe: str) -> Path:
        output = self.folder / "rederived"
        quantize(
            QuantizeOptions(
                model=str(self.reference), output=output, recipe=recipe, backend="streaming", task=self.task
            ),
            self.progress,
        )
        return output


def _type_of(side: GgufSide) -> str | None:
    """The type that `convert-gguf` calls the file's; None of one that llama.cpp makes."""
    label = side.metadata.get("general.file_type")
    return next((name for name, each in FILE_TYPES.items() if label and each.number == label.data), None)


def _recipe(artefact: Path, folder: Path) -> tuple[str, str, list[Finding]]:
    """The recipe as `quantize` takes it, its name, and a note if it is only assumed."""
    manifest = read_json(artefact / MANIFEST) if (artefact / MANIFEST).is_file() else {}
    declared: Any = manifest.get("recipe")
    if isinstance(declared, Mapping) and isinstance(declared.get("text"), str):
        path = folder / "recipe.yaml"
        path.write_text(declared["text"], encoding="utf-8")
        return str(path), str(declared.get("name", "of its own")), []
    return DEFAULT_RECIPE, DEFAULT_RECIPE, [finding("recipe-assumed", artefact, recipe=DEFAULT_RECIPE)]


def _compared(artefact: Path, found: Checkpoint, again: Path, how: str) -> Made:
    """Files first; tensors where the weight files are not the same."""
    table = list(_file_rows(artefact, again))
    weights = [row for row in table if row.name.endswith(".safetensors")]
    findings: list[Finding] = []
    if not all(row.is_equal for row in weights):
        made = open_checkpoint(again)
        table = [row for row in table if row not in weights and row.name != INDEX]
        tensors = list(_tensor_rows(found, made))
        table += tensors
        findings += _tensor_findings(artefact, [row.name for row in tensors if not row.is_equal], made, found)
    others = [row.name for row in table if not row.is_equal and (again / row.name).is_file()]
    if others:
        findings.append(finding("files-not-rederived", artefact, names=_have(others)))
    return findings, table, how


def _tensor_findings(artefact: Path, unequal: Sequence[str], made: Checkpoint, found: Checkpoint) -> Iterator[Finding]:
    names = [*unequal, *(name for name in made.tensors if name not in found.tensors and _counts(name, made))]
    if names:
        yield finding("tensors-not-rederived", artefact, tensors=_have(names))


def _counts(name: str, made: Checkpoint) -> bool:
    """A tied head's copy is left out by some exporters and written by others."""
    return name != "lm_head.weight" or not made.config.get("tie_word_embeddings")


def _have(names: Sequence[str]) -> str:
    return f"{listed(names)} {'has' if len(names) == 1 else 'have'}"


def _file_rows(artefact: Path, again: Path) -> Iterator[RederivedFile]:
    names = sorted(
        p.relative_to(artefact).as_posix() for p in artefact.rglob("*") if p.is_file() and p.name != MANIFEST
    )
    both = [name for name in names if (again / name).is_file()]
    theirs = dict(zip(both, sha256_of([again / name for name in both]), strict=True))
    for name, digest in zip(names, sha256_of([artefact / name for name in names]), strict=True):
        yield RederivedFile(name, digest, theirs.get(name))


def _tensor_rows(found: Checkpoint, made: Checkpoint) -> Iterator[RederivedFile]:
    for name, info in found.tensors.items():
        again = made.tensors.get(name)
        digest = _sha256(info.file, info.offset, info.nbytes)
        same_kind = again is not None and (again.dtype, again.shape) == (info.dtype, info.shape)
        other = _sha256(again.file, again.offset, again.nbytes) if again and same_kind else None
        if other is None and not _counts(name, found):
            continue
        yield RederivedFile(name, digest, other)


def _compare_file(path: Path, mine: GgufSide, again: GgufSide, table: list[RederivedFile]) -> Iterator[Finding]:
    """One row if the file is the same; otherwise one for each tensor."""
    whole = RederivedFile(path.name, *sha256_of([path, again.path]))
    if whole.is_equal:
        table.append(whole)
        return
    rows = list(_stored_rows(mine, again))
    table += rows
    unequal = [row.name for row in rows if not row.is_equal] + [n for n in again.tensors if n not in mine.tensors]
    if unequal:
        yield finding("tensors-not-rederived", path, tensors=_have(unequal))
    fields = [key for key in {**again.metadata, **mine.metadata} if mine.metadata.get(key) != again.metadata.get(key)]
    if fields and any(not key.startswith(_NAMES) for key in fields):
        yield finding("fields-not-rederived", path, fields=listed([k for k in fields if not k.startswith(_NAMES)]))


def _stored_rows(mine: GgufSide, again: GgufSide) -> Iterator[RederivedFile]:
    for name, (path, tensor) in mine.tensors.items():
        source, other = again.tensors.get(name, (path, None))
        # The same bytes are other numbers in another type, and other rows in another shape.
        same_kind = other is not None and (other.type, other.shape) == (tensor.type, tensor.shape)
        digest = _sha256(source, other.offset, other.nbytes) if other and same_kind else None
        yield RederivedFile(name, _sha256(path, tensor.offset, tensor.nbytes), digest)


def _sha256(path: Path, offset: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while nbytes:
            data = file.read(min(nbytes, _CHUNK))
            if not data:
                break
            digest.update(data)
            nbytes -= len(data)
    return digest.hexdigest()
