"""Names what is wrong with a tensor: damaged, misread, misplaced, or simply another one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.arch.prompts import ANSWERS
from qtool.artefact import CheckpointArtefact
from qtool.checks.findings import Finding, finding, listed_are
from qtool.checks.fitted import ROW_BOUND, Standing
from qtool.checks.misreading import byte_swapped, misread, prescaled, proven_mistake
from qtool.checks.weight_pairs import WeightError, distance
from qtool.export.sources import Rows, Whole, encode_rows, float32_runs
from qtool.formats.floats import Float32
from qtool.formats.ggml import F32
from qtool.storage.gguf_model import RANK_HEAD

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
    if numbers[0] == numbers[1]:
        return finding("head-rows-doubled", artefact, tensor=each.pair.name, word=_word(numbers[0], reference))
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


# Names what is wrong with a tensor: damaged, misread, misplaced, changed, or simply another one. A diagnosis is given only
# if undoing the mistake makes the tensor fit; several of one cause are one finding.


_LAYER: Final = re.compile(r"((?:.*\.)?(?:layers|blocks|blk)\.)(\d+)\.(.+)")
_PROJECTOR: Final = ("v.", "mm.")
_VOCABULARY: Final = ("embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight")
_CHANGED: Final = 0.05
"""Weights of one's own revision, or with noise, are nearer to the reference's than this; those of a sibling seldom are."""
_COMPENSATED: Final = 0.05
"""An algorithm that makes up for the error of one weight in the others moves more of the codes.

GPTQ moved 11 % of them for inputs without correlation and 18 % for inputs whose spectrum falls as a power, qtool's
calibration 8 % (on ten tokens) to 31 % of the demo models'; noise of 0.5 % moves 0.9 %, of 2 % 3.4 %.
"""
_RELATED: Final = 0.5
"""The cosine of two models' weights from which on one was trained from the other, or both from a third."""
_SEVERAL: Final = 4
_MOSTLY: Final = 0.75
_ENOUGH: Final = 2


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the artefact while its tensors are explained.

    `algorithm` is what its manifest declares, None where nothing does: under "max" every block scale is that of the largest
    value, so that nothing else is its work.
    """

    artefact: Path
    reference: CheckpointArtefact
    measured: Sequence[WeightError]
    algorithm: str | None = None
    _unexplained_kinds: Counter[str] = field(default_factory=Counter)

    def explain(self) -> list[Finding]:
        """One finding for each cause that the tensors that are not sound have."""
        findings: list[Finding] = []
        unplaced: list[WeightError] = []
        for each in (each for each in self.measured if not each.is_sound):
            found = self._own_finding(each)
            findings += found
            if not found:
                unplaced.append(each)
        unread = [each for each in unplaced if not self._is_near(each)]
        placed = {each.pair.name: other for each in unread if (other := _same_as(each, self.measured))}
        findings += _misplaced(placed, self.artefact)
        left = [each for each in unplaced if each.pair.name not in placed]
        scaled, names = prescaled([each for each in left if each.relative_error > each.bound], self.artefact)
        left = [each for each in left if each.pair.name not in names]
        findings += scaled
        others = list(self._unexplained([each for each in left if not self._is_near(each)]))
        is_foreign = any(each.code == "other-weights" for each in others)  # then its norms are, too
        near = [each for each in left if self._is_near(each) and not (is_foreign and len(each.pair.shape) == 1)]
        return [*findings, *self._changed(near), *others, *self._searched(), *self._unproven()]

    def _own_finding(self, each: WeightError) -> list[Finding]:
        """What can be said of the tensor by itself, or by what undoes a mistake."""
        name = each.pair.name
        if not each.is_finite:
            swapped = byte_swapped(each, self.artefact)
            return [swapped or finding("weights-not-finite", self.artefact, tensor=name)]
        if each.is_zero:
            return [finding("weights-zero", self.artefact, tensor=name)]
        found: Finding | None = None
        if name == RANK_HEAD:
            found = head_finding(each, self.artefact, self.reference)
        elif name.endswith(_VOCABULARY):
            found = row_finding(each, self.artefact, self.reference)
        if found is None and each.is_damaged:
            found = self._damaged(each)
        if found is None and _is_changed_since(each):
            found = proven_mistake(each, self.measured, self.artefact)
        if found is None and not self._is_near(each) and _same_as(each, self.measured) is None:
            found = self._misread(each)
        return [found] if found else []

    def _damaged(self, each: WeightError) -> Finding:
        """Some blocks are wrong: where, if checksums say so, else how many."""
        name, proof = each.pair.name, None if each.is_fitted else each.proof
        if proof is not None and proof.difference is not None:
            facts = {"parts": proof.changed_parts, "region": str(proof.difference.region)}
            return finding("blocks-not-recorded", self.artefact, tensor=name, **facts)
        if each.is_fitted and each.zero_rows:
            return finding(
                "rows-zero", self.artefact, tensor=name, count=f"{each.zero_rows:,}", total=each.pair.shape[0]
            )
        facts = {"count": f"{each.wrong:,}", "total": f"{each.total:,}", "unit": each.unit}
        return finding("blocks-corrupt", self.artefact, tensor=name, **facts)

    def _misread(self, each: WeightError) -> Finding | None:
        """A mistake in reading; two tensors of a kind for which none is known are enough of it."""
        kind = (_LAYER.fullmatch(each.pair.name) or ["", "", "", each.pair.name])[3]
        if self._unexplained_kinds[kind] >= _ENOUGH:
            return None
        found = misread(each, self.measured, self.artefact)
        self._unexplained_kinds[kind] += found is None
        return found

    def _is_near(self, each: WeightError) -> bool:
        """Whether these are the reference's weights but for something small."""
        return each.relative_error <= max(each.bound, _CHANGED)

    def _changed(self, near: Sequence[WeightError]) -> Iterator[Finding]:
        """Weights that no algorithm of their format makes of the reference's, or that another one may have made."""
        uneven = [each for each in near if each.is_fitted and not each.is_even]
        for each in uneven:
            row = {"tensor": each.pair.name, "error": f"{each.worst_row:.3g}", "bound": f"{ROW_BOUND:.3g}"}
            row |= {"far": f"{each.far:,}", "total": f"{each.total:,}"}
            yield self._damaged(each) if each.zero_rows else finding("rows-differ", self.artefact, **row)
        near = [each for each in near if each not in uneven]
        altered = [
            each for each in near if _is_changed_since(each) and (is_compensated(each) or not each.misfits.units)
        ]
        if altered:
            names, parts = listed_are([each.pair.name for each in altered]), _changed_parts(altered)
            error = f"{max(each.relative_error for each in altered):.3g}"
            yield finding("weights-not-recorded", self.artefact, tensors=names, parts=parts, error=error)
        near = [each for each in near if each not in altered]
        matrices = [each for each in self.measured if len(each.pair.shape) > 1]
        several = [each for each in near if len(each.pair.shape) > 1]
        is_revised = len(several) >= max(_SEVERAL, len(matrices) / 2)
        if is_revised:
            largest = max(several, key=lambda each: each.relative_error)
            counts = {"count": len(several), "total": len(matrices), "error": f"{largest.relative_error:.3g}"}
            yield finding("weights-revised", self.artefact, **counts)
        for each in near if not is_revised else ():
            facts = {"count": f"{each.misfits.units:,}", "total": f"{each.total:,}", "unit": each.unit}
            facts |= {"tensor": each.pair.name, "error": f"{each.relative_error:.3g}"}
            is_other = each.proof is not None and each.proof.standing is Standing.OTHER_SOURCE and not each.is_fitted
            yield finding("source-not-recorded" if is_other else "weights-changed", self.artefact, **facts)

    def _unproven(self) -> Iterator[Finding]:
        """Which weights fitted to data were judged without their record, and why."""
        fitted = [each for each in self.measured if each.is_fitted and each.is_sound]
        by_code = {
            "blocks-otherwise-rounded": [each for each in fitted if self.algorithm is None],
            "fitted-by-bound": [each for each in fitted if self.algorithm is not None and each.proof is None],
            "record-contradicted": [each for each in fitted if self.algorithm is not None and each.proof is not None],
        }
        for code, some in ((code, some) for code, some in by_code.items() if some):
            moved = sum(each.misfits.values for each in some) / sum(each.pair.elements for each in some)
            facts = {"tensors": listed_are([each.pair.name for each in some]), "share": f"{moved:.0%}"}
            facts |= {"error": f"{max(each.relative_error for each in some):.3g}", "bound": f"{some[0].bound:.3g}"}
            yield finding(code, self.artefact, **facts)

    def _searched(self) -> list[Finding]:
        searched = [each for each in self.measured if each.is_sound and each.misfits.searched and not each.is_fitted]
        if not searched or self.algorithm not in (None, "max"):
            return []
        names = listed_are([each.pair.name for each in searched])
        code = "scales-not-as-declared" if self.algorithm == "max" else "scales-searched"
        return [finding(code, self.artefact, tensors=names)]

    def _unexplained(self, left: Sequence[WeightError]) -> Iterator[Finding]:
        """Whole files of another model; tensors that differ for no known reason."""
        tower = [each for each in self.measured if _is_of_projector(each) and len(each.pair.shape) > 1]
        if sum(each in left for each in tower) > len(tower) * _MOSTLY:
            yield finding("other-projector", self.artefact, name=tower[0].pair.stored.file, kinship=_kinship(tower))
            left = [each for each in left if not _is_of_projector(each)]
        rest = [each for each in self.measured if len(each.pair.shape) > 1 and each not in tower]
        differing = [each for each in left if len(each.pair.shape) > 1]
        shard = _foreign_shard(left, self.measured)
        if shard:
            yield finding("other-revision", self.artefact, shard=shard, name=shard)
            return
        if len(differing) >= _SEVERAL and len(differing) > len(rest) * _MOSTLY:
            facts = {"count": len(differing), "total": len(rest), "kinship": _kinship(differing)}
            yield finding("other-weights", self.artefact, **facts)
            return
        for each in left:
            error, allowed = f"{each.relative_error:.3g}", f"{each.bound:.3g}"
            facts = {"tensor": each.pair.name, "format": each.pair.stored.format, "error": error, "bound": allowed}
            yield finding("weights-differ", self.artefact, **facts)


def is_compensated(each: WeightError) -> bool:
    """Whether so many codes are not the nearest that only an algorithm that fits weights to data can have moved them."""
    return each.misfits.values >= _COMPENSATED * each.pair.elements


def _is_changed_since(each: WeightError) -> bool:
    """Whether its codes or scales are others than its manifest records."""
    return not each.is_fitted and each.proof is not None and each.proof.standing is Standing.DAMAGED


def _changed_parts(altered: Sequence[WeightError]) -> str:
    return " and ".join(dict.fromkeys(each.proof.changed_parts for each in altered if each.proof is not None))


def _is_of_projector(each: WeightError) -> bool:
    return each.pair.name.startswith(_PROJECTOR)


def _kinship(tensors: Sequence[WeightError]) -> str:
    """What the weights themselves say of whose they are."""
    cosines = sorted(_cosine(each) for each in tensors)
    middle = cosines[len(cosines) // 2]
    kin = "a sibling's, trained from the same model" if middle > _RELATED else "those of an unrelated model"
    return f"{kin} (their median correlation with the reference's is {middle:.2f})"


def _cosine(each: WeightError) -> float:
    found, expected = each.found.astype(np.float64), each.expected.astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.nan_to_num(found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected))))


def _same_as(each: WeightError, measured: Sequence[WeightError]) -> str | None:
    """The other tensor of the reference whose weights these are."""
    for other in measured:
        if other is not each and each.proof is not None and other.proof is not None and each.proof.is_of(other.proof):
            return other.pair.name
    for other in measured:
        is_candidate = other is not each and other.pair.shape == each.pair.shape
        if is_candidate and each.matches(each.found, other.expected):
            return other.pair.name
    return None


def _misplaced(placed: Mapping[str, str], artefact: Path) -> Iterator[Finding]:
    repeated = _repeated_layers(placed)
    steps = {other - layer for layer, other in repeated.values()}
    if len(repeated) > 1 and len(steps) == 1:
        step = steps.pop()
        facts = {"count": len(repeated), "step": f"{abs(step)} {'later' if step > 0 else 'earlier'}"}
        yield finding("layers-shifted", artefact, first=next(iter(repeated)), **facts)
    else:
        for layer, (_, number) in repeated.items():
            yield finding("layer-repeated", artefact, layer=layer, other=_stem(layer) + str(number))
    for name, other in placed.items():
        if _layer_of(name) in repeated:
            continue
        if placed.get(other) != name:
            yield finding("weights-misplaced", artefact, tensor=name, other=other)
        elif name < other:
            yield finding("weights-exchanged", artefact, tensor=name, other=other)


def _repeated_layers(placed: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Layers several of whose tensors are those of one other layer: the numbers of both."""
    moves: Counter[tuple[str, int, int]] = Counter()
    for name, other in placed.items():
        mine, theirs = _LAYER.fullmatch(name), _LAYER.fullmatch(other)
        if mine and theirs and (mine[1], mine[3]) == (theirs[1], theirs[3]):
            moves[mine[1], int(mine[2]), int(theirs[2])] += 1
    return {f"{stem}{layer}": (layer, other) for (stem, layer, other), count in moves.items() if count > 1}


def _layer_of(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{match[2]}" if match else ""


def _stem(layer: str) -> str:
    return layer.rstrip("0123456789")


def _foreign_shard(left: Sequence[WeightError], measured: Sequence[WeightError]) -> str:
    """The one file of several whose every matrix differs while all other files are sound."""
    files = {each.pair.stored.file for each in left}
    shards = {each.pair.stored.file for each in measured if each.pair.stored.file.endswith(".safetensors")}
    if len(files) != 1 or len(shards) < 2:
        return ""
    (shard,) = files
    matrices = [each for each in measured if each.pair.stored.file == shard and len(each.pair.shape) > 1]
    return shard if shard in shards and matrices and all(each in left for each in matrices) else ""
