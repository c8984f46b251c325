"""The rederive stage: make the artefact again from the reference, by its own recipe, and compare the bytes.

The bytes of tensors decide, since the same tensors may lie in other shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.artefact import Artefact, CheckpointArtefact, GgufArtefact, open_artefact
from qtool.checks.declared import manifest_facts
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.fitted_data import FittedData
from qtool.checks.reference import Reference
from qtool.checks.stage import REDERIVE, Outcome, RederivedFile, Stage, concluded, skipped
from qtool.errors import ModelError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import FILE_TYPES, NO_PROJECTOR, ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.progress import Progress, ignore
from qtool.resources import DEFAULT_RECIPE
from qtool.storage.checkpoint import INDEX, Checkpoint
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import OUTPUT, GgufModel, decode, scale_of
from qtool.storage.hashing import sha256_of, sha256_of_part
from qtool.storage.hub import Source
from qtool.storage.packed import BLOCK_SCALE, GLOBAL_SCALE, WEIGHT, is_quantized

_NAMES: Final = ("general.", "split.")
"""How the fields begin that say what a file is called and how it is split, not what the model computes."""

Made = tuple[list[Finding], list[RederivedFile], str]
"""What is to be said, the table, and by which recipe."""


def rederive(
    artefact: Artefact,
    reference: Reference,
    workfolder: Path,
    progress: Progress = ignore,
    requantize: Callable[[QuantizeOptions, Progress], object] = quantize,
    data: Sequence[str] = (),
) -> tuple[Stage, tuple[RederivedFile, ...]]:
    """Make the artefact again in `workfolder` (which needs the space) and compare hashes of files, else of tensors.

    `requantize` also knows the recipes that fit weights to data: that of `data` (panels by name or path, data sets), or of
    what comes with qtool, whose hash the manifest has. Skipped for what llama.cpp quantized, and where that data is not
    here. Raises ModelError if the reference is broken, UsageError where `data` is other data.
    """
    started = time.monotonic()
    reference.require_unquantized()
    rebuilder = _Rebuilder(reference, workfolder, progress, requantize, manifest_facts(artefact))
    fitted = FittedData.of(rebuilder.made_by.get("calibration"))
    if fitted is not None:
        found = fitted.found_in(data)
        if missing := fitted.missing(found):
            return skipped(REDERIVE, missing), ()
        rebuilder = replace(rebuilder, fitted=fitted, data=tuple(name for name in found if name is not None))
    try:
        made = rebuilder.gguf(artefact) if isinstance(artefact, GgufArtefact) else rebuilder.checkpoint(artefact)
    except ModelError as error:
        made = [finding("unreadable", artefact.path, problem=str(error))], [], ""
    if made is None:
        return skipped(REDERIVE, "llama.cpp quantized the file, and its bytes depend on the machine."), ()
    findings, table, how = made
    equal = sum(each.is_equal for each in table)
    good = f"{artefact.path.name} is exactly {reference.path.name} {how}: {equal} of {len(table)} hashes are equal."
    stage = concluded(REDERIVE, started, findings, good)
    excuse = next((each.sentence for each in findings if each.code == "rederived-otherwise"), None)
    if excuse is not None and stage.outcome is Outcome.PASS:
        stage = replace(stage, outcome=Outcome.INCONCLUSIVE, summary=excuse)
    return stage, tuple(table)


@dataclass(frozen=True)
class _Rebuilder:
    """`made_by` is the artefact's manifest; `data` what its weights were `fitted` to, by the names to load it by."""

    reference: Reference
    folder: Path
    progress: Progress
    requantize: Callable[[QuantizeOptions, Progress], object]
    made_by: Mapping[str, Any]
    fitted: FittedData | None = None
    data: tuple[str, ...] = ()

    def checkpoint(self, artefact: CheckpointArtefact) -> Made:
        if not is_quantized(artefact.checkpoint.config):
            return _compared(artefact, self.reference, "as it is")
        recipe, name, findings = self._recipe(artefact.path)
        again = CheckpointArtefact(Source(self._quantized(recipe), recipe))
        others, table, how = _compared(artefact, again, f"under the recipe {name}")
        others = self._excused(others, table, read_json(again.path / MANIFEST), artefact.path)
        shutil.rmtree(again.path)
        return [*findings, *others], table, how

    def gguf(self, artefact: GgufArtefact) -> Made | None:
        kind = _type_of(artefact.model)
        if kind is None:
            return None
        made_again: Mapping[str, Any] = {}
        source, how = self.reference.path, f"as {kind.upper()}"
        if kind == "nvfp4":
            recipe, name, _ = self._recipe(artefact.path)
            source, how = self._quantized(recipe), f"{how} under the recipe {name}"
            made_again = read_json(source / MANIFEST)
        output = self.folder / "converted"
        projector = (_type_of(artefact.projector) or "f16") if artefact.projector else NO_PROJECTOR
        task = self.reference.detection.task
        options = ConvertOptions(model=str(source), output=output, outtypes=(kind,), mmproj=projector, task=task)
        convert_gguf(options, self.progress)
        made = open_artefact(str(output))
        findings: list[Finding] = []
        table: list[RederivedFile] = []
        for mine, again in zip(artefact.models, made.models if isinstance(made, GgufArtefact) else (), strict=False):
            findings += _compare_model(mine, again, table)
        shutil.rmtree(output)
        return self._excused(findings, table, made_again, artefact.path.parent), table, how

    def _quantized(self, recipe: str) -> Path:
        output = self.folder / "rederived"
        task, model = self.reference.detection.task, str(self.reference.path)
        options = QuantizeOptions(model=model, output=output, recipe=recipe, backend="streaming", task=task)
        if self.fitted is not None:
            options = replace(options, data=self.data, effort=self.fitted.effort, limit=self.fitted.limit)
        self.requantize(options, self.progress)
        return output

    def _recipe(self, artefact: Path) -> tuple[str, str, list[Finding]]:
        """The recipe as `quantize` takes it, its name, and a note if it is only assumed."""
        declared: Any = self.made_by.get("recipe")
        if isinstance(declared, Mapping) and isinstance(declared.get("text"), str):
            path = self.folder / "recipe.yaml"
            path.write_text(declared["text"], encoding="utf-8")
            return str(path), str(declared.get("name", "of its own")), []
        return DEFAULT_RECIPE, DEFAULT_RECIPE, [finding("recipe-assumed", artefact, recipe=DEFAULT_RECIPE)]

    def _excused(
        self, findings: Sequence[Finding], table: Sequence[RederivedFile], again: Mapping[str, Any], artefact: Path
    ) -> list[Finding]:
        """The findings; other bytes of calibrated weights are none where something else than a fault may have made them."""
        unequal = [row.name for row in table if not row.is_equal]
        calibrated = {name for each in _entries(self.made_by) for name in _names_of(each)}
        others = [name for name in unequal if name in calibrated]
        reasons = _other_circumstances(self.made_by, again)
        is_excused = len(others) == len([name for name in unequal if "." in name and not (artefact / name).is_file()])
        if self.fitted is None or not others or not reasons or not is_excused:
            return list(findings)
        said = finding("rederived-otherwise", artefact, tensors=_have(others), reasons=reasons)
        return [said if each.code == "tensors-not-rederived" else each for each in findings]


def _type_of(model: GgufModel) -> str | None:
    """The type that `convert-gguf` calls the file's; None of one that llama.cpp makes."""
    number = model.integer("general.file_type")
    return next((name for name, each in FILE_TYPES.items() if each.number == number), None)


def _other_circumstances(made: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    """In what the making of the artefact and its making again differ though all options are equal."""
    pairs = [(made.get(key), again.get(key)) for key in ("calibration", "run")]
    (first, first_again), (run, run_again) = ((_mapping(mine), _mapping(theirs)) for mine, theirs in pairs)
    reasons = [
        f"{label} {first.get(key)} (here {first_again.get(key)})"
        for key, label in (("version", "version of the algorithm:"), ("parameters", "parameters:"))
        if first.get(key) != first_again.get(key)
    ]
    mine, theirs = _mapping(run.get("processor")), _mapping(run_again.get("processor"))
    reasons += [
        f"{key}: {mine.get(key)} (here {theirs.get(key)})" for key in theirs if mine.get(key) != theirs.get(key)
    ]
    return "; ".join(reasons)


def _entries(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a manifest has of the weights that were fitted to data."""
    tensors = manifest.get("tensors")
    yield from (
        (each for each in tensors if isinstance(each, Mapping) and "checksums" in each)
        if isinstance(tensors, list)
        else ()
    )


def _names_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that hold a weight fitted to data."""
    if "gguf_name" in entry:
        return str(entry["gguf_name"]), scale_of(str(entry["gguf_name"]))
    module = str(entry.get("name")).removesuffix(WEIGHT)
    return tuple(module + suffix for suffix in (WEIGHT, BLOCK_SCALE, GLOBAL_SCALE))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _compared(artefact: CheckpointArtefact, again: CheckpointArtefact, how: str) -> Made:
    """Files first; tensors where the weight files are not the same."""
    found, table = artefact.checkpoint, list(_file_rows(artefact.path, again.path))
    weights = [row for row in table if row.name.endswith(".safetensors")]
    findings: list[Finding] = []
    if not all(row.is_equal for row in weights):
        made = again.checkpoint
        table = [row for row in table if row not in weights and row.name != INDEX]
        tensors = list(_tensor_rows(found, made))
        table += tensors
        findings += _tensor_findings(artefact.path, [row.name for row in tensors if not row.is_equal], made, found)
    others = [row.name for row in table if not row.is_equal and (again.path / row.name).is_file()]
    if others:
        findings.append(finding("files-not-rederived", artefact.path, names=_have(others)))
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
        same_kind = again is not None and (again.dtype, again.shape or (1,)) == (info.dtype, info.shape or (1,))
        other = sha256_of_part(again.file, again.offset, again.nbytes) if again and same_kind else None
        if other is None and not _counts(name, found):
            continue
        yield RederivedFile(name, sha256_of_part(info.file, info.offset, info.nbytes), other)


def _compare_model(mine: GgufModel, again: GgufModel, table: list[RederivedFile]) -> Iterator[Finding]:
    """One row if the file is the same; otherwise one for each tensor."""
    path = mine.path
    if len(mine.parts) == len(again.parts) == 1:
        whole = RederivedFile(path.name, *sha256_of([path, again.path]))
        if whole.is_equal:
            table.append(whole)
            return
    rows = list(_stored_rows(mine, again))
    table += rows
    unequal = [row.name for row in rows if not row.is_equal] + [n for n in again.tensors if n not in mine.tensors]
    wider = [name for name in unequal if _is_wider(name, mine, again)]
    unequal = [name for name in unequal if name not in wider and name != OUTPUT]  # a head that no score depends on
    if wider:
        yield finding("tensors-stored-wider", path, tensors=listed_are(wider))
    if unequal:
        yield finding("tensors-not-rederived", path, tensors=_have(unequal))
    fields = [key for key in {**again.metadata, **mine.metadata} if mine.metadata.get(key) != again.metadata.get(key)]
    if fields and any(not key.startswith(_NAMES) for key in fields):
        yield finding("fields-not-rederived", path, fields=listed([k for k in fields if not k.startswith(_NAMES)]))


_WIDENED: Final = {("F32", "F16"), ("F32", "BF16")}
_RUN: Final = 1 << 20


def _is_wider(name: str, mine: GgufModel, again: GgufModel) -> bool:
    """Whether a tensor holds the same numbers in a type that has more room for them."""
    found, made = mine.tensors.get(name), again.tensors.get(name)
    if found is None or made is None or (found.type.name, made.type.name) not in _WIDENED or found.shape != made.shape:
        return False
    for start in range(0, prod(found.shape), _RUN):
        count = min(_RUN, prod(found.shape) - start)
        values = [
            decode(model.read(tensor, tensor.type.nbytes(start), tensor.type.nbytes(count)).reshape(1, -1), tensor.type)
            for model, tensor in ((mine, found), (again, made))
        ]
        # A number that F16 cannot hold is rounded there, and only there.
        if made.type.name == "F16":
            values[0] = values[0].astype(np.float16).astype(np.float32)
        if not np.array_equal(values[0], values[1]):
            return False
    return True


def _stored_rows(mine: GgufModel, again: GgufModel) -> Iterator[RederivedFile]:
    for name, tensor in mine.tensors.items():
        other = again.tensors.get(name)
        # The same bytes are other numbers in another type, and other rows in another shape.
        same_kind = other is not None and (other.type, other.shape) == (tensor.type, tensor.shape)
        digest = _sha256(again, other) if other and same_kind else None
        yield RederivedFile(name, _sha256(mine, tensor), digest)


def _sha256(model: GgufModel, tensor: GgufTensor) -> str:
    return sha256_of_part(Path(model.location.path_of(model.part_of[tensor.gguf_name])), tensor.offset, tensor.nbytes)
