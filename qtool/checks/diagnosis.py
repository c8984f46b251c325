"""Names what is wrong with a tensor: damaged, misread, misplaced, or simply another one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.arch.prompts import ANSWERS
from qtool.artefact import CheckpointArtefact
from qtool.checks.findings import Finding, finding
from qtool.checks.weight_pairs import Blocks, Nvfp4Store, WeightError, distance
from qtool.export.sources import Rows, Whole, encode_rows, float32_runs
from qtool.formats.floats import Float32
from qtool.formats.ggml import F32
from qtool.formats.nvfp4 import BLOCK
from qtool.storage.gguf_model import RANK_HEAD

# NVFP4 weights whose bytes are right and in the wrong place, and weights of any format under a wrong factor. Each
# known mistake is undone on the beginning of the tensor; the one that makes it fit is the diagnosis.


_INVERSE: Final = 0.05
"""How far scale times scale may be from 1; a factor is known to a few percent."""


def misread(each: WeightError, artefact: Path) -> Finding | None:
    """What was done to the tensor, if undoing it makes it fit."""
    name, stored = each.pair.name, each.pair.stored
    blocks = None
    if isinstance(stored, Nvfp4Store):
        blocks = stored.blocks(0, each.expected.size)
        for code, undone in _undone(blocks, each.pair.shape[-1]):
            if each.matches(undone.values(), each.expected):
                return finding(code, artefact, tensor=name)
    factor = _factor(each)
    if factor is None:
        return None
    if blocks is not None and abs(factor * float(blocks.scale) ** 2 - 1) < _INVERSE:
        return finding("global-scale-inverted", artefact, tensor=name)
    return finding("weights-scaled", artefact, tensor=name, factor=f"{1 / factor:.3g}")


def _undone(blocks: Blocks, columns: int) -> Iterator[tuple[str, Blocks]]:
    yield "nibbles-swapped", replace(blocks, packed=(blocks.packed >> 4 | blocks.packed << 4).astype(np.uint8))
    rows = blocks.block_scales
    if columns % BLOCK == 0 and rows.size % (columns // BLOCK) == 0:
        rows = rows.reshape(-1, columns // BLOCK)
    for step in (1, -1):
        yield "block-scales-shifted", replace(blocks, block_scales=np.roll(blocks.block_scales, step))
        yield "block-scales-shifted", replace(blocks, block_scales=np.roll(rows, step, axis=-1).reshape(-1))


def _factor(each: WeightError) -> float | None:
    """What the stored weights must be multiplied with to fit, if there is such a number."""
    found, expected = each.found.astype(np.float64), each.expected.astype(np.float64)
    power = float(found @ found)
    if not power:
        return None
    factor = float(found @ expected) / power
    scaled = (factor * found).astype(np.float32)
    is_plain = each.bound == 0  # then a factor leaves rounding errors that the format itself has not
    fits = np.linalg.norm(scaled - each.expected) <= 0.01 * np.linalg.norm(expected) if is_plain else False
    return factor if factor > 0 and (fits or each.matches(scaled, each.expected)) else None


# Rows of the vocabulary that stand in the wrong place: those of the answers above all. Rows are recognised by their
# weights, and called by the reference's tokenizer.


_SAME: Final = 0.05
"""Two rows of a vocabulary differ by far more, and no format that a head may have loses as much."""
_MOST: Final = 8


def head_finding(each: WeightError, artefact: Path, reference: CheckpointArtefact) -> Finding | None:
    """Which rows of the vocabulary the rank head holds, if they are others than yes and no."""
    source = each.pair.source
    if not isinstance(source, Rows):
        return None
    rows = each.found.reshape(each.pair.shape)
    expected = each.expected.reshape(each.pair.shape)
    if all(_is_same(rows[place], expected[1 - place]) for place in (0, 1)):
        return finding("head-rows-exchanged", artefact, tensor=each.pair.name)
    numbers = _numbers_of(rows, Whole(source.checkpoint, source.info, each.pair.name, F32), each.pair.shape[1])
    if None in numbers:
        return None
    words = " and ".join(_word(number, reference) for number in numbers)
    return finding("head-other-rows", artefact, found=words)


def row_finding(each: WeightError, artefact: Path, reference: CheckpointArtefact) -> Finding | None:
    """Two rows of the vocabulary that have changed places."""
    places = _wrong_rows(each)
    if len(places) != 2:
        return None
    first, second = places
    width = each.pair.shape[1]
    expected = _rows_of(each, places)
    found = [each.pair.stored.values(place * width, width) for place in places]
    if not (_is_same(found[0], expected[1]) and _is_same(found[1], expected[0])):
        return None
    words = {_word(place, reference) for place in places}
    if words == set(ANSWERS):
        return finding("head-rows-exchanged", artefact, tensor=each.pair.name)
    return finding("rows-exchanged", artefact, tensor=each.pair.name, first=first, second=second)


def _is_same(found: Float32, expected: Float32) -> bool:
    return distance(found, expected) < _SAME


def _numbers_of(rows: Float32, vocabulary: Whole, width: int) -> list[int | None]:
    """The number of each row in the vocabulary."""
    numbers: list[int | None] = [None] * len(rows)
    for start, values in float32_runs(vocabulary):
        skipped = -start % width  # of a row that began in the chunk before
        whole = values[skipped : skipped + (values.size - skipped) // width * width].reshape(-1, width)
        for place, row in enumerate(rows):
            with np.errstate(divide="ignore", invalid="ignore"):
                errors = np.linalg.norm(whole - row, axis=1) / np.linalg.norm(whole, axis=1)
            if errors.size and np.nanmin(errors) < _SAME:
                numbers[place] = (start + skipped) // width + int(np.nanargmin(errors))
    return numbers


def _wrong_rows(each: WeightError) -> list[int]:
    """The rows that are far from the reference's, if they are few."""
    rows, width = each.pair.shape
    error, power = np.zeros(rows), np.zeros(rows)
    for start, expected in each.pair.expected():
        places = np.arange(start, start + expected.size) // width
        difference = each.pair.stored.values(start, expected.size) - expected
        error += np.bincount(places, difference.astype(np.float64) ** 2, rows)
        power += np.bincount(places, expected.astype(np.float64) ** 2, rows)
    wrong = np.flatnonzero(error > _SAME**2 * power)
    return [int(place) for place in wrong] if len(wrong) <= _MOST else []


def _rows_of(each: WeightError, places: Sequence[int]) -> list[Float32]:
    """Some rows of the reference's tensor."""
    source: Any = each.pair.source
    rows = encode_rows(source.checkpoint, source.info, places, F32)
    return list(rows.view(np.float32).reshape(len(places), -1))


def _word(number: int | None, reference: CheckpointArtefact) -> str:
    vocabulary = reference.tokenizer.get("model", {}).get("vocab", {})
    return next((word for word, place in vocabulary.items() if place == number), f"token {number}")


# Names what is wrong with a tensor: damaged, misread, misplaced, or simply another one. A diagnosis is given only if
# undoing the mistake makes the tensor fit; several of one cause are one finding.


_LAYER: Final = re.compile(r"((?:.*\.)?(?:layers|blocks|blk)\.\d+)\.(.+)")
_PROJECTOR: Final = ("v.", "mm.")
_VOCABULARY: Final = ("embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight")


def explain(
    bad: Sequence[WeightError], measured: Sequence[WeightError], artefact: Path, reference: CheckpointArtefact
) -> list[Finding]:
    """One finding for each cause that the `bad` tensors among the `measured` have."""
    findings: list[Finding] = []
    unplaced: list[WeightError] = []
    for each in bad:
        found = _own_finding(each, artefact, reference)
        findings += found
        if not found:
            unplaced.append(each)
    placed = {each.pair.name: other for each in unplaced if (other := _same_as(each, measured))}
    findings += _misplaced(placed, artefact)
    left = [each for each in unplaced if each.pair.name not in placed]
    return findings + list(_unexplained(left, measured, artefact))


def _own_finding(each: WeightError, artefact: Path, reference: CheckpointArtefact) -> list[Finding]:
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


def _same_as(each: WeightError, measured: Sequence[WeightError]) -> str | None:
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


def _unexplained(left: Sequence[WeightError], measured: Sequence[WeightError], artefact: Path) -> Iterator[Finding]:
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


def _foreign_shard(left: Sequence[WeightError], measured: Sequence[WeightError]) -> str:
    """The one file of several whose every matrix differs while all other files are sound."""
    files = {each.pair.stored.file for each in left}
    shards = {each.pair.stored.file for each in measured if each.pair.stored.file.endswith(".safetensors")}
    if len(files) != 1 or len(shards) < 2:
        return ""
    (shard,) = files
    matrices = [each for each in measured if each.pair.stored.file == shard and len(each.pair.shape) > 1]
    return shard if shard in shards and matrices and all(each in left for each in matrices) else ""
