"""`python -m qtool.export.libllama`: llama-cpp-python's library with the command line of `llama-quantize`.

It takes the arguments that `llama_quantize` passes, writes the same bytes as llama.cpp's program, and has no other use.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qtool.errors import ModelError, QtoolError, SetupError
from qtool.export.gguf_plan import LLAMA_QUANTIZE_TYPES
from qtool.formats.ggml import GGML_TYPES
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import GgufModel, open_gguf_file

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_TYPE_NUMBERS: Final = {ggml_type.name.lower(): number for number, ggml_type in GGML_TYPES.items()}
_LONGEST_TEXT: Final = 127  # bytes of an override's value


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean square of each input column, by tensor; `origin` is its description in the metadata of a quantized file."""

    columns: Mapping[str, npt.NDArray[np.float32]]
    origin: Mapping[str, str | int]


def main(arguments: Sequence[str]) -> int:
    """Run the program; errors go to stderr, as llama.cpp's do. Returns the exit status."""
    try:
        return _quantize(_parsed(arguments))
    except QtoolError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return error.exit_code


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tensor-type", action="append", default=[])
    parser.add_argument("--token-embedding-type", choices=_TYPE_NUMBERS)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("type", type=str.lower, choices=LLAMA_QUANTIZE_TYPES)
    return parser.parse_args(arguments)


def _quantize(options: argparse.Namespace) -> int:
    library = _library()
    library.llama_log_set(library.llama_log_callback(), None)  # to stderr, which the caller reads
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = LLAMA_QUANTIZE_TYPES[options.type]
    parameters.token_embedding_type = _TYPE_NUMBERS[options.token_embedding_type]
    parameters.tt_overrides = _array(library.llama_model_tensor_override, _patterns(options.tensor_type))
    if options.imatrix:
        matrix = read_imatrix(options.imatrix)
        parameters.imatrix = _array(library.llama_model_imatrix_data, _columns(matrix))
        parameters.kv_overrides = _array(library.llama_model_kv_override, _overrides(library, matrix))
    library.llama_backend_init()
    status = library.llama_model_quantize(
        os.fsencode(options.source), os.fsencode(options.target), ctypes.byref(parameters)
    )
    return int(status)


def _library() -> ModuleType:
    # An optional package without types: whether mypy reports it depends on the machine.
    from llama_cpp import llama_cpp as library  # type: ignore[import-not-found, unused-ignore]

    if not hasattr(
        library, "llama_model_tensor_override"
    ):  # earlier versions take a C++ vector, which ctypes cannot build
        raise SetupError(
            "The installed llama-cpp-python cannot keep single tensors unquantized.",
            "pip install 'llama-cpp-python>=0.3.36'",
        )
    return library  # type: ignore[no-any-return, unused-ignore]


def _array(kind: Any, entries: Iterator[tuple[Any, ...]]) -> Any:
    """A C array that ends with an empty entry, as llama.cpp expects."""
    filled = [kind(*entry) for entry in entries]
    return (kind * (len(filled) + 1))(*filled)


def _patterns(tensor_types: Sequence[str]) -> Iterator[tuple[bytes, int]]:
    for tensor_type in tensor_types:
        pattern, _, type_name = tensor_type.rpartition("=")
        yield pattern.encode(), _TYPE_NUMBERS[type_name]


def _columns(matrix: ImportanceMatrix) -> Iterator[tuple[bytes, Any, int]]:
    for gguf_name, values in matrix.columns.items():
        yield gguf_name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size


def _overrides(library: ModuleType, matrix: ImportanceMatrix) -> Iterator[tuple[int, bytes, Any]]:
    for key, fact in matrix.origin.items():
        value = library.llama_model_kv_override_value()
        if isinstance(fact, int):
            value.val_i64 = fact
            yield library.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode(), value
        else:
            value.val_str = fact.encode()[:_LONGEST_TEXT]
            yield library.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode(), value


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix in the current format of `llama-imatrix`, a GGUF file. Raises ModelError for another."""
    try:
        file = open_gguf_file(path)
    except ModelError as error:
        hint = "An importance matrix in the old format (.dat) needs the program llama-quantize on PATH."
        raise ModelError(error.message, hint) from None
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if not names:
        raise ModelError(f"{path} is not an importance matrix: it has no tensor that ends in {_SUMS}.")
    columns = {name: _mean_squares(file, name) for name in sorted(names)}
    return ImportanceMatrix(columns, dict(_origin(file, path, len(columns))))


def _mean_squares(file: GgufModel, name: str) -> npt.NDArray[np.float32]:
    """Sums divided by counts, per expert; 1 for a column without data."""
    pair = file.tensors.get(name + _SUMS), file.tensors.get(name + _COUNTS)
    if any(tensor is None or tensor.type.name != "F32" for tensor in pair):
        raise ModelError(f"{file.target} has no {name}{_SUMS} or no {name}{_COUNTS} in F32.")
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
