"""Recognises a tensor whose bytes are the reference's and are stored, ordered or scaled otherwise than they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.checks.findings import Finding, finding
from qtool.checks.fitted import Proof, row_bands
from qtool.checks.weight_pairs import Blocks, Nvfp4Store, WeightError, distance
from qtool.formats.floats import E4M3_VALUES, U8, Float32, encode_e4m3
from qtool.formats.nvfp4 import BLOCK, E2M1_VALUES, block_scale_codes, unpack

# Each known mistake is undone on the beginning of the tensor, or on all of it. It is the diagnosis only if what comes out
# is the reference's tensor, to within its format's rounding.

_INVERSE: Final = 0.05
"""How far scale times scale may be from 1; a factor is known to a few percent."""
_RIGHT: Final = 0.01
"""Blocks that may still be wrong once a mistake in NVFP4's bytes has been undone."""
_NEAR_ONE: Final = 0.01
_MUCH_NEARER: Final = 0.6
"""Of its error, what is left of a tensor fitted to data once a mistake has been undone."""
_WHOLE: Final = 1 << 24
"""Weights of the largest tensor that is read whole, and looked at from all sides."""


def misread(each: WeightError, measured: Sequence[WeightError], artefact: Path) -> Finding | None:
    """What was done to the tensor, if undoing it gives the reference's."""
    code = next(_mistakes(each, measured), None)
    if code is not None:
        return finding(code, artefact, tensor=each.pair.name)
    return _misscaled(each, measured, artefact) or _moved(each, artefact)


def proven_mistake(each: WeightError, measured: Sequence[WeightError], artefact: Path) -> Finding | None:
    """What was done to a tensor whose codes or scales are not as recorded, if undoing it gives the recorded ones."""
    stored, proof = each.pair.stored, each.proof
    if proof is None or not isinstance(stored, Nvfp4Store):
        return None
    name = each.pair.name
    if proof.difference is None:
        return _other_global_scale(each, proof, measured, artefact)
    expected, blocks = _leading(each, stored)
    for code, undone in _undone(blocks, each, expected):
        if proof.is_restored_by(undone.packed, undone.block_scales):
            return finding(code, artefact, tensor=name)
    if not proof.difference.codes and any(_has_scales_of(proof, other) for other in measured if other is not each):
        return finding("block-scales-misplaced", artefact, tensor=name)
    return None


def _leading(each: WeightError, stored: Nvfp4Store) -> tuple[Float32, Blocks]:
    """The first rows that are looked at from all sides, or all, beside the reference's."""
    rows, columns = each.pair.shape
    ends = [last for _, last in row_bands(rows) if last * columns <= _WHOLE] or [next(row_bands(rows))[1]]
    count = ends[-1] * columns
    expected = np.empty(count, np.float32)
    for start, values in each.pair.expected():
        if start >= count:
            break
        part = values[: count - start]
        expected[start : start + part.size] = part
    return expected, stored.blocks(0, count)


def _has_scales_of(proof: Proof, other: WeightError) -> bool:
    if other.proof is None or other.proof.shape != proof.shape:
        return False
    return bool(np.array_equal(proof.checksums.by_rows[1], other.proof.recorded.checksums.by_rows[1]))


def _other_global_scale(
    each: WeightError, proof: Proof, measured: Sequence[WeightError], artefact: Path
) -> Finding | None:
    """Whose global scale it is, or what it was multiplied with."""
    name, found, recorded = each.pair.name, float(proof.scale), float(proof.recorded.global_scale)
    if abs(found * recorded - 1) < _NEAR_ONE:
        return finding("global-scale-inverted", artefact, tensor=name)
    for other in measured:
        if other is not each and other.proof is not None and other.proof.recorded.global_scale == proof.scale:
            return finding("global-scale-misplaced", artefact, tensor=name, other=other.pair.name)
    return finding("weights-scaled", artefact, tensor=name, factor=f"{found / recorded:.6g}")


def _mistakes(each: WeightError, measured: Sequence[WeightError]) -> Iterator[str]:
    stored = each.pair.stored
    if isinstance(stored, Nvfp4Store):
        blocks = stored.blocks(0, each.expected.size)
        for code, undone in _undone(blocks, each, each.expected):
            if _fits(undone, each):
                yield code
        inverted = replace(blocks, block_scales=_inverse(blocks.block_scales))
        if each.matches(inverted.values(), each.expected):
            yield "block-scales-inverted"
        yield from _foreign_scales(blocks, each, measured)


def _fits(undone: Blocks, each: WeightError) -> bool:
    """Whether the reference may be rounded to these blocks; of weights fitted to data, whether they are much nearer to it."""
    if not each.is_fitted:
        return undone.compare(each.expected)[1].units <= _RIGHT * undone.block_scales.size
    error = distance(undone.values(), each.expected)
    return error <= each.bound and error <= _MUCH_NEARER * distance(each.found, each.expected)


def _undone(blocks: Blocks, each: WeightError, expected: Float32) -> Iterator[tuple[str, Blocks]]:
    """Known mistakes in the order of codes and scales, each undone."""
    yield "nibbles-swapped", replace(blocks, packed=(blocks.packed >> 4 | blocks.packed << 4).astype(np.uint8))
    is_nearest = each.proof is None and not each.is_fitted
    table = _code_table(blocks, expected) if is_nearest else _table_by_medians(blocks, expected)
    if table is not None:
        low, high = table[blocks.packed & 15], table[blocks.packed >> 4]
        is_complement = all(table[code] == 24 - code for code in range(9, 16))
        yield "codes-twos-complement" if is_complement else "codes-renumbered", replace(blocks, packed=low | high << 4)
    rows, columns = blocks.block_scales, each.pair.shape[-1]
    if columns % BLOCK == 0 and rows.size % (columns // BLOCK) == 0:
        rows = rows.reshape(-1, columns // BLOCK)
    for step in (1, -1):
        yield "block-scales-shifted", replace(blocks, block_scales=np.roll(blocks.block_scales, step))
        yield "block-scales-shifted", replace(blocks, block_scales=np.roll(rows, step, axis=-1).reshape(-1))
    for scales in _straightened(each):
        yield "block-scales-swizzled", replace(blocks, block_scales=scales[: blocks.block_scales.size])


def _code_table(blocks: Blocks, expected: Float32) -> U8 | None:
    """Which code stands for which, if the stored ones are the right ones under other numbers."""
    with np.errstate(all="ignore"):
        factors = E4M3_VALUES[blocks.block_scales] * blocks.scale
        quotients = expected.reshape(-1, BLOCK) / factors[:, None]
        nearest = np.abs(np.abs(quotients)[..., None] - E2M1_VALUES[:8]).argmin(axis=-1)
    wanted = nearest + np.where(quotients < 0, 8, 0)
    counts = np.zeros((16, 16), np.int64)
    np.add.at(counts, (unpack(blocks.packed), wanted), 1)
    table = counts.argmax(axis=1).astype(np.uint8)
    used = counts.sum(axis=1) > 0
    table[~used] = np.arange(16, dtype=np.uint8)[~used]
    is_other = bool((table[used] != np.arange(16)[used]).any())
    return table if is_other and len(set(table[used] & 15)) > 1 else None


def _table_by_medians(blocks: Blocks, expected: Float32) -> U8 | None:
    """Likewise of codes that need not be the nearest: each stands for the number next to the median of its weights."""
    with np.errstate(all="ignore"):
        quotients = expected.reshape(-1, BLOCK) / (E4M3_VALUES[blocks.block_scales] * blocks.scale)[:, None]
    codes = unpack(blocks.packed)
    table = np.arange(16, dtype=np.uint8)
    for code in np.unique(codes):
        table[code] = np.abs(np.median(quotients[codes == code]) - E2M1_VALUES).argmin()  # of the two zeros the first
    used = table[np.unique(codes)]
    is_renumbered = np.unique(used[used > 0]).size == np.count_nonzero(used)  # else they are scaled, or anything
    return table if is_renumbered and bool((table != np.arange(16)).any()) else None


def _inverse(scales: U8) -> U8:
    with np.errstate(all="ignore"):
        values = np.nan_to_num(1 / E4M3_VALUES[scales], nan=448, posinf=448)
    return encode_e4m3(np.clip(values, 0, 448).astype(np.float32))


def _straightened(each: WeightError) -> Iterator[U8]:
    """All block scales out of, and into, the tiles of 128 rows and 4 blocks that the tensor cores of Blackwell read."""
    rows, columns = each.pair.shape[0], each.pair.shape[-1] // BLOCK
    if len(each.pair.shape) != 2 or rows % 128 or columns % 4 or each.pair.elements > _WHOLE:
        return
    store: Any = each.pair.stored
    scales = store.blocks(0, each.pair.elements).block_scales
    yield scales.reshape(rows // 128, columns // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1)
    yield scales.reshape(rows // 128, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1)


def _foreign_scales(blocks: Blocks, each: WeightError, measured: Sequence[WeightError]) -> Iterator[str]:
    """The block scales of another tensor of this shape beside codes that are right under their own."""
    maxima = np.abs(each.expected.reshape(-1, BLOCK)).max(axis=1)
    with np.errstate(all="ignore"):
        own = replace(blocks, block_scales=block_scale_codes(maxima, blocks.scale))
    if not _fits(own, each):
        return
    for other in measured:
        is_candidate = other is not each and other.pair.shape == each.pair.shape
        if is_candidate and isinstance(other.pair.stored, Nvfp4Store):
            theirs = other.pair.stored.blocks(0, each.expected.size).block_scales
            if np.array_equal(theirs, blocks.block_scales):
                yield "block-scales-misplaced"
                return


# Weights under a wrong factor.


def _misscaled(each: WeightError, measured: Sequence[WeightError], artefact: Path) -> Finding | None:
    factor, name = _factor(each), each.pair.name
    if factor is None:
        return None
    stored = each.pair.stored
    scale = stored.blocks(0, BLOCK).scale if isinstance(stored, Nvfp4Store) else None
    if scale is not None and abs(factor * float(scale) ** 2 - 1) < _INVERSE:
        return finding("global-scale-inverted", artefact, tensor=name)
    for other in measured if scale is not None else ():
        theirs = other.pair.stored
        if other.is_sound and isinstance(theirs, Nvfp4Store) and theirs.blocks(0, BLOCK).scale == scale:
            return finding("global-scale-misplaced", artefact, tensor=name, other=other.pair.name)
    return finding("weights-scaled", artefact, tensor=name, factor=f"{1 / factor:.3g}")


def _factor(each: WeightError) -> float | None:
    """What the stored weights must be multiplied with to fit, if there is such a number and it is not 1."""
    with np.errstate(all="ignore"):
        found, expected = each.found.astype(np.float64), each.expected.astype(np.float64)
        power = float(found @ found)
    if not power or not np.isfinite(power):
        return None
    factor = float(found @ expected) / power
    scaled = (factor * found).astype(np.float32)
    is_plain = each.bound == 0  # then a factor leaves rounding errors that the format itself has not
    fits = np.linalg.norm(scaled - each.expected) <= 0.01 * np.linalg.norm(expected) if is_plain else False
    is_other = abs(factor - 1) > _NEAR_ONE
    return factor if is_other and factor and (fits or each.matches(scaled, each.expected)) else None


# Weights in another order: bytes, rows, columns, the whole matrix.


def byte_swapped(each: WeightError, artefact: Path) -> Finding | None:
    """Whether the numbers have another byte order, in which they may be anything."""
    return finding("bytes-swapped", artefact, tensor=each.pair.name) if _is_byte_swapped(each) else None


def _moved(each: WeightError, artefact: Path) -> Finding | None:
    if len(each.pair.shape) != 2 or each.pair.elements > _WHOLE:
        return byte_swapped(each, artefact)
    if swapped := byte_swapped(each, artefact):
        return swapped
    found = each.pair.stored.values(0, each.pair.elements).reshape(each.pair.shape)
    expected = np.concatenate([values.copy() for _, values in each.pair.expected()]).reshape(each.pair.shape)
    code = next(_orders(each, found, expected), None)
    return finding(code, artefact, tensor=each.pair.name) if code else None


def _orders(each: WeightError, found: Float32, expected: Float32) -> Iterator[str]:
    """What undoes the order of a whole matrix."""
    rows, columns = found.shape
    if each.matches(found.T if rows == columns else found.reshape(columns, rows).T, expected):
        yield "weights-transposed"
    if rows % 3 == 0 and _are_parts_moved(each, found, expected):
        yield "fused-parts-moved"
    for name, mine, theirs in (("rows", found, expected), ("columns", found.T, expected.T)):
        places = _places(mine[:_LOOKED_AT], theirs[:_LOOKED_AT])
        if places is not None and each.matches(mine[: len(places)], theirs[places]):
            yield "rope-permuted" if name == "rows" and _is_rope_order(places) else f"{name}-permuted"


_LOOKED_AT: Final = 256
_SURELY: Final = 0.9
"""The cosine of the same row in two formats; those of different rows are near 0."""
_SWAPPED: Final[dict[str, Callable[[Float32], Float32]]] = {
    "F32": lambda values: values.view(np.uint32).byteswap().view(np.float32),
    "BF16": lambda values: ((values.view(np.uint32) >> 16).astype(np.uint16).byteswap().astype(np.uint32) << 16).view(
        np.float32
    ),
    "F16": lambda values: values.astype(np.float16).view(np.uint16).byteswap().view(np.float16).astype(np.float32),
}


def _is_byte_swapped(each: WeightError) -> bool:
    swap = _SWAPPED.get(each.pair.stored.format)
    if swap is None:
        return False
    with np.errstate(all="ignore"):
        undone = swap(each.found)
        near = np.abs(undone - each.expected) <= 2.0**-7 * np.abs(each.expected)
    return bool(near.mean() > 1 - _RIGHT)  # a NaN may have lost its bits


def _are_parts_moved(each: WeightError, found: Float32, expected: Float32) -> bool:
    """Whether the three parts of a fused matrix, such as q, k and v, are the reference's in another order."""
    mine, theirs = np.split(found, 3), np.split(expected, 3)
    places = [[place for place, part in enumerate(theirs) if each.matches(one, part)] for one in mine]
    return all(len(place) == 1 for place in places) and sorted(p[0] for p in places) == [0, 1, 2]


def _places(found: Float32, expected: Float32) -> NDArray[np.int64] | None:
    """For each of the first rows found, which of the first rows expected it is; None where one is none of them."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(found, axis=1)[:, None] * np.linalg.norm(expected, axis=1)[None]
        cosines = np.nan_to_num((found @ expected.T) / lengths)
    places = cosines.argmax(axis=1)
    is_order = len(set(places.tolist())) == len(places) and bool((places != np.arange(len(places))).any())
    return places if is_order and cosines.max(axis=1).min() > _SURELY else None


def _is_rope_order(places: NDArray[np.int64]) -> bool:
    """Whether the two halves of each head are interleaved, as llama.cpp wants them of other families, or the reverse."""
    for width in (width for width in (16, 32, 64, 128, 256) if len(places) % width == 0):
        row = np.arange(len(places))
        base, inside = row // width * width, row % width
        woven = base + inside % 2 * (width // 2) + inside // 2
        unwoven = base + inside % (width // 2) * 2 + inside // (width // 2)
        if np.array_equal(places, woven) or np.array_equal(places, unwoven):
            return True
    return False


# Weights whose columns were scaled, and what comes before by the inverse, as AWQ does: the product is the reference's.


def prescaled(left: Sequence[WeightError], artefact: Path) -> tuple[list[Finding], set[str]]:
    """Such pairs among the tensors that differ, and the names of all that belong to one."""
    findings: list[Finding] = []
    names: set[str] = set()
    for each in left:
        factors = _column_factors(each)
        for partner in left if factors is not None else ():
            if partner is not each and _is_inverse(partner, factors):
                findings.append(finding("weights-prescaled", artefact, tensor=each.pair.name, other=partner.pair.name))
                names |= {each.pair.name, partner.pair.name}
                break
    return findings, names


def _column_factors(each: WeightError) -> NDArray[np.float64] | None:
    """What each column was multiplied with, if dividing by it makes the tensor fit."""
    if len(each.pair.shape) != 2:
        return None
    width = each.pair.shape[1]
    count = each.expected.size // width * width
    found, expected = each.found[:count].reshape(-1, width), each.expected[:count].reshape(-1, width)
    with np.errstate(all="ignore"):
        factors = (found * expected).sum(axis=0, dtype=np.float64) / (expected * expected).sum(axis=0, dtype=np.float64)
        fits = bool((factors > 0).all()) and each.matches((found / factors).astype(np.float32), expected)
    return factors if fits else None


def _is_inverse(partner: WeightError, factors: NDArray[np.float64] | None) -> bool:
    """Whether the elements of a vector, or the rows of a matrix, were divided by the factors."""
    if factors is None or partner.pair.shape[0] != factors.size:
        return False
    width = partner.pair.shape[1] if len(partner.pair.shape) == 2 else 1
    found, expected = (v[: v.size // width * width].reshape(-1, width) for v in (partner.found, partner.expected))
    with np.errstate(all="ignore"):
        ratios = (found * expected).sum(axis=1, dtype=np.float64) / (expected * expected).sum(axis=1, dtype=np.float64)
        products = ratios * factors[: ratios.size]
        is_changed = distance(found.reshape(-1), expected.reshape(-1)) > _NEAR_ONE
    return bool(is_changed and np.median(np.abs(products - 1)) < _INVERSE)
