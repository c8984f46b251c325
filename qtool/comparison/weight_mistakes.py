"""Names what is wrong with a tensor: damaged, misread, misplaced, or simply another one.

Rule: a diagnosis is given only if undoing the mistake makes the tensor fit; several of one cause are one finding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from qtool.comparison.catalogue import finding
from qtool.comparison.weight_measure import Measured
from qtool.comparison.weight_misread import misread
from qtool.comparison.weight_rows import head_finding, row_finding
from qtool.convert.names import RANK_HEAD
from qtool.inspection.finding import Finding

_LAYER: Final = re.compile(r"((?:.*\.)?(?:layers|blocks|blk)\.\d+)\.(.+)")
_PROJECTOR: Final = ("v.", "mm.")
_VOCABULARY: Final = ("embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight")


def explain(bad: Sequence[Measured], measured: Sequence[Measured], artefact: Path, reference: Path) -> list[Finding]:
    """One finding for each cause that the `bad` tensors among the `measured` have."""
    findings: list[Finding] = []
    unplaced: list[Measured] = []
    for each in bad:
        found = _own_finding(each, artefact, reference)
        findings += found
        if not found:
            unplaced.append(each)
    placed = {each.pair.name: other for each in unplaced if (other := _same_as(each, measured))}
    findings += _misplaced(placed, artefact)
    left = [each for each in unplaced if each.pair.name not in placed]
    return findings + list(_unexplained(left, measured, artefact))


def _own_finding(each: Measured, artefact: Path, reference: Path) -> list[Finding]:
    """What can be said of the tensor by itself."""
    name = each.pair.name
    if not each.is_finite:
        return [finding("weights-not-finite", artefact, tensor=name)]
    if each.is_zero:
        return [finding("weights-zero", artefact, tensor=name)]
    if name == RANK_HEAD and (found := head_finding(each, artefact, reference)):
        return [found]
    if name.endswith(_VOCABULARY) and (found := row_finding(each, artefact, reference)):
        return [found]
    if each.is_damaged or each.relative_error <= each.bound:
        code = "blocks-corrupt" if each.is_damaged else "blocks-otherwise-rounded"
        facts = {"count": f"{each.misfits:,}", "total": f"{each.total:,}", "unit": each.unit}
        return [finding(code, artefact, tensor=name, **facts)]
    found = misread(each, artefact)
    return [found] if found else []


def _same_as(each: Measured, measured: Sequence[Measured]) -> str | None:
    """The other tensor of the reference whose weights these are."""
    for other in measured:
        is_candidate = other is not each and other.pair.shape == each.pair.shape
        if is_candidate and each.matches(each.found, other.expected):
            return other.pair.name
    return None


def _misplaced(placed: Mapping[str, str], artefact: Path) -> Iterator[Finding]:
    repeated = _repeated_layers(placed)
    for layer, other in repeated.items():
        yield finding("layer-repeated", artefact, layer=layer, other=other)
    for name, other in placed.items():
        if _layer_of(name) in repeated:
            continue
        if placed.get(other) != name:
            yield finding("weights-misplaced", artefact, tensor=name, other=other)
        elif name < other:
            yield finding("weights-exchanged", artefact, tensor=name, other=other)


def _repeated_layers(placed: Mapping[str, str]) -> dict[str, str]:
    """Layers several of whose tensors are those of one other layer."""
    moves: Counter[tuple[str, str]] = Counter()
    for name, other in placed.items():
        mine, theirs = _LAYER.fullmatch(name), _LAYER.fullmatch(other)
        if mine and theirs and mine[2] == theirs[2]:
            moves[mine[1], theirs[1]] += 1
    return {layer: other for (layer, other), count in moves.items() if count > 1}


def _layer_of(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return match[1] if match else ""


def _unexplained(left: Sequence[Measured], measured: Sequence[Measured], artefact: Path) -> Iterator[Finding]:
    """Whole files of another model; tensors that differ for no known reason."""
    tower = [each for each in measured if each.pair.name.startswith(_PROJECTOR) and len(each.pair.shape) > 1]
    if tower and all(each in left for each in tower):
        yield finding("other-projector", artefact, name=tower[0].pair.stored.file)
        left = [each for each in left if not each.pair.name.startswith(_PROJECTOR)]
    shard = _foreign_shard(left, measured)
    if shard:
        yield finding("other-revision", artefact, shard=shard, name=shard)
        return
    for each in left:
        error, allowed = f"{each.relative_error:.3g}", f"{each.bound:.3g}"
        facts = {"tensor": each.pair.name, "format": each.pair.stored.format, "error": error, "bound": allowed}
        yield finding("weights-differ", artefact, **facts)


def _foreign_shard(left: Sequence[Measured], measured: Sequence[Measured]) -> str:
    """The one file of several whose every matrix differs while all other files are sound."""
    files = {each.pair.stored.file for each in left}
    shards = {each.pair.stored.file for each in measured if each.pair.stored.file.endswith(".safetensors")}
    if len(files) != 1 or len(shards) < 2:
        return ""
    (shard,) = files
    matrices = [each for each in measured if each.pair.stored.file == shard and len(each.pair.shape) > 1]
    return shard if shard in shards and matrices and all(each in left for each in matrices) else ""
