"""Whose rows a GGUF file's rank head holds, and which NVFP4 scales llama.cpp ignores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from qtool.arch.gguf_names import OUTPUT, RANK_HEAD, TOKEN_EMBEDDING
from qtool.arch.prompts import NO, YES
from qtool.formats.ggml import BF16, F16, F32, NVFP4, GgmlType
from qtool.storage.gguf import GgufTensor

# Whose rows a GGUF file's rank head holds, by the vocabulary's own rows of yes and no in the same file. Two rows are
# the same if they differ by no more than the types in which they are stored explain; a head that is neither those
# rows nor the same exchanged is one of its own, as fine-tuning makes it or an untied vocabulary head that the file
# lacks, and no fault.


TOKENS_KEY: Final = "tokenizer.ggml.tokens"

_FLOATS: Final = (F32, F16, BF16)
_FLOAT_TOLERANCE: Final = 2.0**-6  # several roundings to BF16
_MOST: Final = 0.5  # rows of different tokens lie further apart
_ROWS_AT_ONCE: Final = 4096

Rows = NDArray[np.float32]
Read = Callable[[GgufTensor, int, int], bytes]
"""Some bytes of a tensor: from where in it, and how many."""


class HeadOrder(Enum):
    """What the rows of a head are."""

    RIGHT = "yes, no"
    EXCHANGED = "no, yes"
    OWN = "rows of its own"


@dataclass(frozen=True)
class Vocabulary:
    """The matrix that gives each token its logit, and the rows in it of yes and no."""

    matrix: GgufTensor
    answers: tuple[int, int]


def answer_matrix(tensors: Mapping[str, GgufTensor]) -> GgufTensor | None:
    """The matrix [tokens, width] that gives each token its logit: the head, or the embedding that is tied to it."""
    matrix = tensors.get(OUTPUT) or tensors.get(TOKEN_EMBEDDING)
    return matrix if matrix is not None and len(matrix.shape) == 2 else None


def vocabulary(tensors: Mapping[str, GgufTensor], tokens: Sequence[str]) -> Vocabulary | None:
    """See Vocabulary; None where the matrix or one of the answers is missing."""
    matrix = answer_matrix(tensors)
    if matrix is None or YES not in tokens or NO not in tokens:
        return None
    answers = tokens.index(YES), tokens.index(NO)
    return Vocabulary(matrix, answers) if max(answers) < matrix.shape[0] else None


def head_order(tensors: Mapping[str, GgufTensor], tokens: Sequence[str], read: Read) -> HeadOrder | None:
    """What the rows of the rank head are; None where there is nothing to compare them with."""
    head, known = tensors.get(RANK_HEAD), vocabulary(tensors, tokens)
    if head is None or known is None or head.shape != (2, known.matrix.shape[1]):
        return None
    found, answers = read_rows(head, (0, 1), read), read_rows(known.matrix, known.answers, read)
    if found is None or answers is None:
        return None
    far = {HeadOrder.RIGHT: distance(found, answers), HeadOrder.EXCHANGED: distance(found, answers[::-1])}
    nearest = min(far, key=far.__getitem__)
    return nearest if far[nearest] <= tolerance(head.type, known.matrix.type) else HeadOrder.OWN


def distance(rows: Rows, others: Rows) -> float:
    """How far the rows differ, as a part of the length of `others`; of several pairs the largest, infinite if no number."""
    with np.errstate(all="ignore"):
        parts = np.linalg.norm(rows.astype(np.float64) - others, axis=1) / np.linalg.norm(others, axis=1)
    return float(np.max(np.nan_to_num(parts, nan=np.inf)))


def tolerance(*types: GgmlType) -> float:
    """The largest distance that storing the same rows in these types explains: four times the step of their bits."""
    return min(sum(map(_tolerance, types)), _MOST)


def _tolerance(kind: GgmlType) -> float:
    return _FLOAT_TOLERANCE if kind in _FLOATS else 4 * 2.0 ** -(8 * kind.block_bytes / kind.block)


def read_rows(tensor: GgufTensor, rows: Sequence[int], read: Read) -> Rows | None:
    """Some rows of a matrix [rows, width]; None for a type that cannot be decoded."""
    width = tensor.nbytes // tensor.shape[0]
    return decoded(b"".join(read(tensor, row * width, width) for row in rows), len(rows), tensor.type)


def decoded(data: bytes, rows: int, kind: GgmlType) -> Rows | None:
    """The weights in the bytes of whole rows; None for a type that cannot be decoded."""
    try:
        stored = np.frombuffer(data, np.uint8).reshape(rows, -1)
        with np.errstate(all="ignore"):  # a broken file's scales may be no numbers, which `distance` tells
            return np.asarray(dequantize(stored, GGMLQuantizationType(kind.number)), np.float32)
    except NotImplementedError:
        return None


def tokens_of_head(head: GgufTensor, matrix: GgufTensor, read: Read) -> tuple[int | None, ...]:
    """Of each row of the head the token whose row it is, None where it is no token's; reads the whole matrix."""
    found = read_rows(head, range(head.shape[0]), read)
    if found is None or head.shape[1] != matrix.shape[1]:
        return (None,) * head.shape[0]
    far, nearest = np.full(len(found), np.inf), np.zeros(len(found), np.int64)
    for start, distances in _distances(found, matrix, read):
        closer = distances.min(axis=0) < far
        nearest[closer] = start + distances.argmin(axis=0)[closer]
        far[closer] = distances.min(axis=0)[closer]
    limit = tolerance(head.type, matrix.type)
    return tuple(int(token) if part <= limit else None for token, part in zip(nearest, far, strict=True))


def _distances(head: Rows, matrix: GgufTensor, read: Read) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Run by run of the matrix: its first row, and how far each row of it [run] lies from each of the head's [run, rows]."""
    width = matrix.nbytes // matrix.shape[0]
    for start in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, matrix.shape[0] - start)
        rows = decoded(read(matrix, start * width, count * width), count, matrix.type)
        if rows is None:
            return
        with np.errstate(all="ignore"):
            lengths = np.linalg.norm(rows, axis=1).astype(np.float64)[:, None]
            squares = lengths**2 - 2.0 * (rows @ head.T) + np.linalg.norm(head, axis=1).astype(np.float64) ** 2
            parts = np.sqrt(np.maximum(squares, 0)) / lengths
        yield start, np.nan_to_num(parts, nan=np.inf, posinf=np.inf)


# The scales that llama.cpp loads and does not multiply by, which no error tells. Found by running it, and declared
# here once for all who warn of it or refuse; a test that is expected to fail will tell when llama.cpp has changed.


_IGNORED: Final[Mapping[str, re.Pattern[str]]] = {"qwen3vl": re.compile(r"blk\.\d+\.ffn_(up|gate|down)\.scale")}
"""By architecture; the graph of qwen3, unlike qwen3vl's, applies them."""
SEEN_IN: Final = "b11549"


def ignored_scales(architecture: str | None, tensors: Mapping[str, GgufTensor]) -> list[str]:
    """The global scales of NVFP4 tensors without which llama.cpp computes."""
    pattern = _IGNORED.get(architecture or "")
    packed = [name.removesuffix(".weight") + ".scale" for name, each in tensors.items() if each.type is NVFP4]
    return [name for name in packed if pattern and name in tensors and pattern.fullmatch(name)]
