"""Rows of the vocabulary that stand in the wrong place: those of the answers above all.

Rule: rows are recognised by their weights, and called by the reference's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.arch.prompts import NO, YES
from qtool.comparison.catalogue import finding
from qtool.comparison.weight_measure import Measured, distance
from qtool.convert.sources import Rows, Whole
from qtool.convert.tokenizer import read_tokenizer
from qtool.formats.floats import Float32
from qtool.formats.ggml import F32
from qtool.inspection.finding import Finding

_SAME: Final = 0.05
"""Two rows of a vocabulary differ by far more, and no format that a head may have loses as much."""
_MOST: Final = 8


def head_finding(each: Measured, artefact: Path, reference: Path) -> Finding | None:
    """Which rows of the vocabulary the rank head holds, if they are others than yes and no."""
    source = each.pair.source
    if not isinstance(source, Rows):
        return None
    rows = each.found.reshape(each.pair.shape)
    expected = each.expected.reshape(each.pair.shape)
    if all(_is_same(rows[place], expected[1 - place]) for place in (0, 1)):
        return finding("head-rows-exchanged", artefact, tensor=each.pair.name, maker="convert-gguf")
    numbers = _numbers_of(rows, Whole(source.checkpoint, source.info), each.pair.shape[1])
    if None in numbers:
        return None
    words = " and ".join(_word(number, reference) for number in numbers)
    return finding("head-other-rows", artefact, found=words, maker="convert-gguf")


def row_finding(each: Measured, artefact: Path, reference: Path) -> Finding | None:
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
    if words == {YES, NO}:
        return finding("head-rows-exchanged", artefact, tensor=each.pair.name)
    return finding("rows-exchanged", artefact, tensor=each.pair.name, first=first, second=second)


def _is_same(found: Float32, expected: Float32) -> bool:
    return distance(found, expected) < _SAME


def _numbers_of(rows: Float32, vocabulary: Whole, width: int) -> list[int | None]:
    """The number of each row in the vocabulary."""
    numbers: list[int | None] = [None] * len(rows)
    for start, _, encode in vocabulary.pieces(F32):
        values = encode().view(np.float32)
        skipped = -(start // F32.block_bytes) % width  # of a row that began in the piece before
        whole = values[skipped : skipped + (values.size - skipped) // width * width].reshape(-1, width)
        for place, row in enumerate(rows):
            with np.errstate(divide="ignore", invalid="ignore"):
                errors = np.linalg.norm(whole - row, axis=1) / np.linalg.norm(whole, axis=1)
            if errors.size and np.nanmin(errors) < _SAME:
                numbers[place] = (start // F32.block_bytes + skipped) // width + int(np.nanargmin(errors))
    return numbers


def _wrong_rows(each: Measured) -> list[int]:
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


def _rows_of(each: Measured, places: Sequence[int]) -> list[Float32]:
    """Some rows of the reference's tensor."""
    source: Any = each.pair.source
    (_, _, encode), *_ = Rows(source.checkpoint, source.info, tuple(places)).pieces(F32)
    return list(encode().view(np.float32).reshape(len(places), -1))


def _word(number: int | None, reference: Path) -> str:
    vocabulary = read_tokenizer(reference).get("model", {}).get("vocab", {})
    return next((word for word, place in vocabulary.items() if place == number), f"token {number}")
