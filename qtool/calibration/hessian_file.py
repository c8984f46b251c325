"""Hessians on disk: a safetensors file that is filled group by group, so that memory holds one of them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from typing_extensions import Self

from qtool.calibration.collect import InputGroup
from qtool.calibration.moments import Moments
from qtool.storage.atomic import atomic_write, refuse_existing, require_space

_FORMAT: Final = "qtool-hessians"
_DTYPES: Final = {"F32": 4, "I64": 8}


class HessianFile:
    """Of each group, by its module: `.hessian` [in, in] and `.mean` [in], means over tokens, and `.tokens` [1].

    Use as a context; groups are written in any order, and the file appears under its name when the block ends well.
    """

    def __init__(self, path: Path, groups: Sequence[InputGroup]) -> None:
        self._path = path
        self._places: dict[str, int] = {}
        self._header = self._laid_out(groups)
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        require_space(self._path, self._nbytes)
        self._file = self._stack.enter_context(atomic_write(self._path))
        self._file.write(self._header)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]  # as they were given

    def write(self, module: str, moments: Moments) -> None:
        """Write the moments of one group."""
        if self._file is None:
            raise ValueError("the file is not open")
        parts = {
            "hessian": moments.hessian.astype("<f4"),
            "mean": moments.mean.astype("<f4"),
            "tokens": np.array([moments.tokens], "<i8"),
        }
        for part, values in parts.items():
            self._file.seek(self._places[f"{module}.{part}"])
            self._file.write(values.tobytes())

    def _laid_out(self, groups: Sequence[InputGroup]) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": _FORMAT}}
        offset = 0
        for dtype, part in (("I64", "tokens"), ("F32", "hessian"), ("F32", "mean")):
            for group in groups:
                shape = {"tokens": [1], "hessian": [group.columns] * 2, "mean": [group.columns]}[part]
                end = offset + _DTYPES[dtype] * math.prod(shape)
                entries[f"{group.module}.{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
                self._places[f"{group.module}.{part}"] = offset
                offset = end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        self._places = {name: place + len(header) for name, place in self._places.items()}
        self._nbytes = len(header) + offset
        return header


def check_hessian_file(path: Path, *, force: bool) -> None:
    """Raise UsageError where the path exists; with `force` only where it is not such a file."""
    refuse_existing(path, _is_ours, "it holds something else", force=force)


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(64)
    return _FORMAT.encode() in start
