"""`python -m qtool.export.libllama`: llama-cpp-python's library with the command line of `llama-quantize`.

It takes the arguments that `llama_quantize` passes, writes the same bytes as llama.cpp's program, and has no other use.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from qtool.errors import ModelError, QtoolError, SetupError
from qtool.export.gguf_plan import LLAMA_QUANTIZE_TYPES
from qtool.export.imatrix import ImportanceMatrix, read_imatrix
from qtool.formats.ggml import GGML_TYPES
from qtool.storage.gguf import MAGIC

_TYPE_NUMBERS: Final = {ggml_type.name.lower(): number for number, ggml_type in GGML_TYPES.items()}
_LONGEST_TEXT: Final = 127  # bytes of an override's value


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
        matrix = _read(options.imatrix)
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


def _read(path: Path) -> ImportanceMatrix:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(
                f"{path} is not a GGUF file.",
                "An importance matrix in the old format (.dat) needs the program llama-quantize on PATH.",
            )
    return read_imatrix(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
