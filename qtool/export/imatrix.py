"""Importance matrices: what llama.cpp's K- and I-quants weigh the columns of each matrix by."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qtool.errors import ModelError, UsageError
from qtool.storage.gguf import MAGIC, GgufTensor
from qtool.storage.gguf_model import GgufModel, open_gguf_file

SUMS: Final = ".in_sum2"
COUNTS: Final = ".counts"
FACTS_KEY: Final = "qtool.calibration"
"""The field in which `qtool calibrate` describes its data."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean square of each input column, by tensor.

    `origin` is its description in the metadata of a quantized file, `facts` what `qtool calibrate` wrote of its data.
    """

    columns: Mapping[str, npt.NDArray[np.float32]]
    origin: Mapping[str, str | int]
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix of `llama-imatrix` or `qtool calibrate`, a GGUF file. Raises ModelError for another."""
    file = open_gguf_file(path)
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        raise ModelError(f"{path} is not an importance matrix: it has no tensor that ends in {SUMS}.")
    columns = {name: _mean_squares(file, name) for name in sorted(names)}
    return ImportanceMatrix(columns, dict(_origin(file, path, len(columns))), _facts(file))


def read_old_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix in the old format of `llama-imatrix` (.dat). Raises ModelError for another file."""
    columns: dict[str, npt.NDArray[np.float32]] = {}
    try:
        with path.open("rb") as file:
            for _ in range(*struct.unpack("<i", file.read(4))):
                name = file.read(*struct.unpack("<i", file.read(4))).decode()
                calls, width = struct.unpack("<ii", file.read(8))
                sums = np.frombuffer(file.read(4 * width), "<f4", width)
                columns[name] = np.divide(sums, max(calls, 1), dtype=np.float32)
    except (struct.error, ValueError):
        columns = {}
    if not columns or not all(map(len, columns.values())):
        raise ModelError(f"{path} is not an importance matrix.")
    return ImportanceMatrix(columns, {"quantize.imatrix.file": str(path)})


def check_imatrix(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ImportanceMatrix:
    """The matrix at `path`. Raises UsageError unless it fits a model whose layers have matrices of these `shapes`.

    It fits if it has each of them, with as many columns, and none of another layer.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError:
        raise UsageError(f"No such file: --imatrix {path}.") from None
    matrix = read_imatrix(path) if is_gguf else read_old_imatrix(path)
    missing = [name for name in shapes if name not in matrix.columns]
    if missing:
        raise UsageError(
            f"--imatrix {path} has no data for {missing[0]} (matrices without data: {len(missing)}).", _OTHER
        )
    for name, shape in shapes.items():
        if (width := len(matrix.columns[name])) != shape[-1]:
            raise UsageError(f"--imatrix {path} has {width} columns for {name}; the model has {shape[-1]}.", _OTHER)
    foreign = [name for name in matrix.columns if name.startswith(LAYER) and name not in shapes]
    if foreign:
        raise UsageError(f"--imatrix {path} has data for {foreign[0]}, which the model does not have.", _OTHER)
    return matrix


LAYER: Final = "blk."
"""How the names of the tensors of layers begin."""
_OTHER: Final = "Check that it was made for this model: `qtool calibrate MODEL -o STATS.gguf`."


def _mean_squares(file: GgufModel, name: str) -> npt.NDArray[np.float32]:
    """Sums divided by counts, per expert; 1 for a column without data."""
    pair = file.tensors.get(name + SUMS), file.tensors.get(name + COUNTS)
    if any(tensor is None or tensor.type.name != "F32" for tensor in pair):
        raise ModelError(f"{file.target} has no {name}{SUMS} or no {name}{COUNTS} in F32.")
    sums, counts = (_values(file, tensor) for tensor in pair if tensor is not None)
    sums, counts = sums.reshape(counts.size, -1), counts.reshape(-1, 1)
    means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
    return np.ascontiguousarray(means).reshape(-1)


def _values(file: GgufModel, tensor: GgufTensor) -> npt.NDArray[np.float32]:
    return file.read(tensor).view("<f4")


def _origin(file: GgufModel, path: Path, entries: int) -> Iterator[tuple[str, str | int]]:
    """The keys that `llama-quantize` writes, in its order."""
    yield "quantize.imatrix.file", str(path)
    for dataset in file.texts("imatrix.datasets")[:1]:
        yield "quantize.imatrix.dataset", dataset
    yield "quantize.imatrix.entries_count", entries
    if (chunks := file.integer("imatrix.chunk_count") or 0) > 0:
        yield "quantize.imatrix.chunks_count", chunks


def _facts(file: GgufModel) -> Mapping[str, Any]:
    try:
        facts = json.loads(file.text(FACTS_KEY) or "{}")
    except (ValueError, RecursionError):  # somebody else's field of that name
        return {}
    return facts if isinstance(facts, dict) else {}
