"""Checksums of a packed NVFP4 weight by bands of rows and of columns, by which a changed byte is found and located."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4 import BLOCK

BANDS: Final = 32
"""Bands each way. With four lists of them a weight has 512 bytes: 140 kB for the 196 weights of a 2B model."""

Words = NDArray[np.uint32]


@dataclass(frozen=True)
class Region:
    """Half-open ranges of rows and of columns of a weight."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    def __str__(self) -> str:
        """As a message names it."""
        (top, bottom), (left, right) = self.rows, self.columns
        return f"rows {top}-{bottom - 1}, columns {left}-{right - 1}"


@dataclass(frozen=True)
class Nvfp4Checksums:
    """CRC-32 of a weight's codes and block scales: of each band of rows (`by_rows`) and of columns (`by_columns`).

    A band's bytes are those of its rows from the first to the last. `by_rows` and `by_columns` are [2, bands]: codes, then
    block scales.
    """

    by_rows: Words
    by_columns: Words

    def encoded(self) -> str:
        """As a text: base64 of little-endian words, rows first."""
        words = np.concatenate([self.by_rows.reshape(-1), self.by_columns.reshape(-1)]).astype("<u4")
        return base64.b64encode(words.tobytes()).decode("ascii")

    @classmethod
    def decoded(cls, text: str, shape: Sequence[int]) -> Nvfp4Checksums | None:
        """What `encoded` made of a weight of `shape`; None of another text."""
        rows, columns = (len(band_edges(count)) - 1 for count in (shape[0], shape[1] // BLOCK))
        try:
            words = np.frombuffer(base64.b64decode(text, validate=True), "<u4").astype(np.uint32)
        except (binascii.Error, ValueError):
            return None
        if words.size != 2 * (rows + columns):
            return None
        return cls(words[: 2 * rows].reshape(2, rows), words[2 * rows :].reshape(2, columns))


def band_edges(count: int) -> list[int]:
    """Where the bands of `count` rows or blocks begin, and the end of the last."""
    bands = min(BANDS, max(count, 1))
    return [count * band // bands for band in range(bands + 1)]


def checksums(packed: U8, block_scales: U8) -> Nvfp4Checksums:
    """Those of a weight in memory: `packed` [rows, in/2], `block_scales` [rows, in/16]."""
    edges = band_edges(len(packed))
    return checksums_of((packed[first:last], block_scales[first:last]) for first, last in pairwise(edges))


def checksums_of(row_bands: Iterator[tuple[U8, U8]]) -> Nvfp4Checksums:
    """Those of a weight that is read band by band of `band_edges(rows)`."""
    by_rows: list[tuple[int, int]] = []
    by_columns: list[list[int]] = [[], []]
    for parts in row_bands:
        blocks = parts[1].shape[1]
        edges = band_edges(blocks)
        by_columns = by_columns if by_columns[0] else [[0] * (len(edges) - 1) for _ in parts]
        by_rows.append(
            (zlib.crc32(np.ascontiguousarray(parts[0]).data), zlib.crc32(np.ascontiguousarray(parts[1]).data))
        )
        for part, sums in zip(parts, by_columns, strict=True):
            width = part.shape[1] // blocks
            for band, (first, last) in enumerate(pairwise(edges)):
                sums[band] = zlib.crc32(np.ascontiguousarray(part[:, first * width : last * width]).data, sums[band])
    return Nvfp4Checksums(np.array(by_rows, np.uint32).T, np.array(by_columns, np.uint32))


def float_checksum(values: Float32, start: int = 0) -> int:
    """CRC-32 of float32 values, whatever they are stored as; `start` is that of the values before them."""
    return zlib.crc32(np.ascontiguousarray(values, "<f4").data, start)


@dataclass(frozen=True)
class Difference:
    """Where checksums differ: `codes` and `block_scales` say in which, `region` is the smallest that has all bands that do.

    `share` is the part of the weight that the differing bands cross.
    """

    codes: bool
    block_scales: bool
    region: Region
    share: float


def compare_checksums(found: Nvfp4Checksums, recorded: Nvfp4Checksums, shape: Sequence[int]) -> Difference | None:
    """How a weight of `shape` differs from the one that `recorded` was made of; None if it does not."""
    rows, columns = found.by_rows != recorded.by_rows, found.by_columns != recorded.by_columns
    if not rows.any() and not columns.any():
        return None
    codes, scales = (bool(rows[part].any() or columns[part].any()) for part in (0, 1))
    places = [np.flatnonzero(each.any(axis=0)) for each in (rows, columns)]
    edges = [band_edges(shape[0]), [edge * BLOCK for edge in band_edges(shape[1] // BLOCK)]]
    # Bands of one direction alone never differ where bytes do; a record that was edited may say so.
    spans = [
        (each[int(place[0])], each[int(place[-1]) + 1]) if place.size else (0, each[-1])
        for place, each in zip(places, edges, strict=True)
    ]
    share = float(np.prod([max(place.size, 1) / (len(each) - 1) for place, each in zip(places, edges, strict=True)]))
    return Difference(codes, scales, Region(*spans), share)
