"""Statistics as llama.cpp's importance matrix, a GGUF file that `llama-quantize --imatrix` reads.

For each linear, by its GGUF name, `.in_sum2` holds the sums of squares of its input's columns and `.counts` the number
of tokens. `qtool.calibration` describes the data for the manifest of what is quantized with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGUFValueType

from qtool.arch.family import Family
from qtool.calibration.collect import InputGroup, SquareSums
from qtool.calibration.facts import CalibrationFacts
from qtool.errors import ModelError
from qtool.export.imatrix import COUNTS, FACTS_KEY, SUMS
from qtool.formats.ggml import F32
from qtool.storage.atomic import atomic_write, refuse_existing
from qtool.storage.gguf import Value, read_gguf, uint32
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out

_CHUNK: Final = 512
"""Tokens of a chunk, by which llama.cpp counts; its own tool reads texts in chunks of so many by default."""


def write_imatrix(
    path: Path,
    family: Family,
    groups: Sequence[InputGroup],
    squares: Mapping[str, SquareSums],
    facts: CalibrationFacts,
) -> None:
    """Write the matrix, in place of `path` at once."""
    values = dict(sorted(_values(family, groups, squares)))
    tensors = [GgufOutputTensor(name, F32, value.shape, value.nbytes) for name, value in values.items()]
    (layout,) = lay_out(path.name, _metadata(facts), tensors)
    content = bytearray(layout.nbytes)
    content[: len(layout.header)] = layout.header
    for name, value in values.items():
        start, nbytes = layout.ranges[name]
        content[start : start + nbytes] = value.tobytes()
    with atomic_write(path) as file:
        file.write(content)


def check_imatrix_file(path: Path, *, force: bool) -> None:
    """Raise UsageError where the path exists; with `force` only where it is no importance matrix."""
    refuse_existing(path, _is_imatrix, "it is no importance matrix", force=force)


def _is_imatrix(path: Path) -> bool:
    try:
        return bool(read_gguf(path).get("general.type") == "imatrix")
    except ModelError:
        return False


def _metadata(facts: CalibrationFacts) -> dict[str, Value]:
    return {
        "general.type": Value(GGUFValueType.STRING, "imatrix"),
        "imatrix.datasets": Value(GGUFValueType.STRING, [facts.name], is_array=True),
        "imatrix.chunk_count": uint32(-(-facts.tokens // _CHUNK)),
        "imatrix.chunk_size": uint32(_CHUNK),
        FACTS_KEY: Value(GGUFValueType.STRING, json.dumps(facts.to_dict(), ensure_ascii=False)),
    }


def _values(
    family: Family, groups: Sequence[InputGroup], squares: Mapping[str, SquareSums]
) -> Iterator[tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    for group in groups:
        sums = squares[group.module]
        for hf_name in group.hf_names:
            gguf_name = family.gguf_names.of(hf_name)
            if gguf_name is None:
                raise ModelError(f"{hf_name} has no counterpart in llama.cpp's {family.gguf_architecture}.")
            yield gguf_name + SUMS, sums.squares[None].astype("<f4")
            yield gguf_name + COUNTS, np.full((1, 1), sums.tokens, "<f4")
