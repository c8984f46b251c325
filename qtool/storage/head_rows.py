"""Whose rows the rank head of a GGUF model holds, by the vocabulary's own rows of the answers in the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.floats import Float32
from qtool.formats.ggml import FLOAT_TYPES, GgmlType
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import OUTPUT, RANK_HEAD, TOKEN_EMBEDDING, TOKENS_KEY, GgufModel, decode

# Two rows are the same if they differ by no more than the types in which they are stored explain. A head that is
# neither those rows nor the same exchanged is one of its own, as fine-tuning makes it or an untied vocabulary head that
# the file lacks, and no fault.

_FLOAT_TOLERANCE: Final = 2.0**-6  # several roundings to BF16
_MOST: Final = 0.5  # rows of different tokens lie further apart
_ROWS_AT_ONCE: Final = 4096


class HeadOrder(Enum):
    """What the rows of a head are."""

    RIGHT = "yes, no"
    EXCHANGED = "no, yes"
    OWN = "rows of its own"


@dataclass(frozen=True)
class Vocabulary:
    """The matrix that gives each token its logit, and the rows in it of the two answers."""

    matrix: GgufTensor
    answers: tuple[int, int]


def answer_matrix(model: GgufModel) -> GgufTensor | None:
    """The matrix [tokens, width] that gives each token its logit: the head, or the embedding that is tied to it."""
    matrix = model.tensors.get(OUTPUT) or model.tensors.get(TOKEN_EMBEDDING)
    return matrix if matrix is not None and len(matrix.shape) == 2 else None


def vocabulary(model: GgufModel, answers: tuple[str, str]) -> Vocabulary | None:
    """The matrix and the rows of `answers`, yes first; None where the matrix or one of the answers is missing."""
    matrix, tokens = answer_matrix(model), model.texts(TOKENS_KEY)
    if matrix is None or any(answer not in tokens for answer in answers):
        return None
    rows = tokens.index(answers[0]), tokens.index(answers[1])
    return Vocabulary(matrix, rows) if max(rows) < matrix.shape[0] else None


def head_order(model: GgufModel, answers: tuple[str, str]) -> HeadOrder | None:
    """What the rows of the rank head are; None where there is nothing to compare them with."""
    head, known = model.tensors.get(RANK_HEAD), vocabulary(model, answers)
    if head is None or known is None or head.shape != (2, known.matrix.shape[1]):
        return None
    found, expected = decoded_rows(model, head, (0, 1)), decoded_rows(model, known.matrix, known.answers)
    if found is None or expected is None:
        return None
    far = {HeadOrder.RIGHT: distance(found, expected), HeadOrder.EXCHANGED: distance(found, expected[::-1])}
    nearest = min(far, key=far.__getitem__)
    return nearest if far[nearest] <= tolerance(head.type, known.matrix.type) else HeadOrder.OWN


def distance(rows: Float32, others: Float32) -> float:
    """How far the rows differ, as a part of the length of `others`; of several pairs the largest, infinite if no number."""
    with np.errstate(all="ignore"):
        parts = np.linalg.norm(rows.astype(np.float64) - others, axis=1) / np.linalg.norm(others, axis=1)
    return float(np.max(np.nan_to_num(parts, nan=np.inf)))


def tolerance(*types: GgmlType) -> float:
    """The largest distance that storing the same rows in these types explains: four times the step of their bits."""
    return min(sum(map(_tolerance, types)), _MOST)


def _tolerance(kind: GgmlType) -> float:
    return _FLOAT_TOLERANCE if kind in FLOAT_TYPES else 4 * 2.0 ** -(8 * kind.block_bytes / kind.block)


def decoded_rows(model: GgufModel, tensor: GgufTensor, rows: Sequence[int]) -> Float32 | None:
    """Some rows of a matrix [rows, width]; None for a type that cannot be decoded."""
    try:
        return decode(model.read_rows(tensor, rows), tensor.type)
    except NotImplementedError:
        return None


def tokens_of_head(model: GgufModel, head: GgufTensor, matrix: GgufTensor) -> tuple[int | None, ...]:
    """Of each row of the head the token whose row it is, None where it is no token's; reads the whole matrix."""
    found = decoded_rows(model, head, range(head.shape[0]))
    if found is None or head.shape[1] != matrix.shape[1]:
        return (None,) * head.shape[0]
    far, nearest = np.full(len(found), np.inf), np.zeros(len(found), np.int64)
    for start, distances in _distances(model, found, matrix):
        closer = distances.min(axis=0) < far
        nearest[closer] = start + distances.argmin(axis=0)[closer]
        far[closer] = distances.min(axis=0)[closer]
    limit = tolerance(head.type, matrix.type)
    return tuple(int(token) if part <= limit else None for token, part in zip(nearest, far, strict=True))


def _distances(model: GgufModel, head: Float32, matrix: GgufTensor) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Run by run of the matrix: its first row, and how far each row of it [run] lies from each of the head's [run, rows]."""
    width = matrix.nbytes // matrix.shape[0]
    for start in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, matrix.shape[0] - start)
        try:
            rows = decode(model.read(matrix, start * width, count * width).reshape(count, width), matrix.type)
        except NotImplementedError:
            return
        with np.errstate(all="ignore"):
            lengths = np.linalg.norm(rows, axis=1).astype(np.float64)[:, None]
            squares = lengths**2 - 2.0 * (rows @ head.T) + np.linalg.norm(head, axis=1).astype(np.float64) ** 2
            parts = np.sqrt(np.maximum(squares, 0)) / lengths
        yield start, np.nan_to_num(parts, nan=np.inf, posinf=np.inf)
