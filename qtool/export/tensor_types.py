"""`--tensor-type PATTERN=TYPE`: types that llama.cpp gives to single matrices of a K- or I-quant, checked before it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qtool.errors import UsageError
from qtool.formats.ggml import GGML_TYPES, GgmlType
from qtool.jsonfile import read_bounded
from qtool.storage.gguf_model import RANK_HEAD, TOKEN_EMBEDDING

NAMES: Final = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
)  # fmt: skip
"""What llama.cpp makes with or without an importance matrix, in its own names."""

_TYPES: Final[Mapping[str, GgmlType]] = {
    each.name.lower(): each for each in GGML_TYPES.values() if each.name.lower() in NAMES
}
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class TensorType:
    """The type of every matrix in whose name the regular expression `pattern` is found, unless an earlier one is."""

    pattern: str
    type: GgmlType
    is_in_file: bool = False

    @property
    def argument(self) -> str:
        """As `llama-quantize` takes it."""
        return f"{self.pattern}={self.type.name.lower()}"


def parse_tensor_types(words: Sequence[str], file: Path | None = None) -> tuple[TensorType, ...]:
    """Those of `--tensor-type`, then those of a file, divided by white space. Raises UsageError."""
    named = tuple(_parsed(word) for word in words)
    return (*named, *(replace(_parsed(word), is_in_file=True) for word in (_of_file(file) if file else ())))


def _of_file(path: Path) -> list[str]:
    try:
        return read_bounded(path, _MAX_BYTES, may_be_pipe=True).decode().split()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"--tensor-type-file {path} cannot be read.", "Pass a text file of lines PATTERN=TYPE."
        ) from None


def _parsed(word: str) -> TensorType:
    pattern, _, name = word.rpartition("=")
    if not pattern or not name:
        raise UsageError(f"Invalid --tensor-type {word!r}: expected PATTERN=TYPE.", "For example attn_v=q6_k.")
    if name.lower() not in _TYPES:
        raise UsageError(f"Unknown type {name!r} in --tensor-type {word}.", f"Choose one of {', '.join(NAMES)}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"Invalid pattern in --tensor-type {word!r}: {error}.", "It is a regular expression."
        ) from None
    return TensorType(pattern.lower(), _TYPES[name.lower()])  # as llama-quantize does


def check_tensor_types(types: Sequence[TensorType], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UsageError unless each pattern decides a matrix of these `shapes`, whose rows its type divides.

    llama.cpp ignores a pattern that matches nothing, and takes another type where the rows are not whole blocks.
    """
    chosen = chosen_types(types, shapes)
    for each in types:
        names = [name for name in shapes if re.search(each.pattern, name)]
        if not names:
            raise UsageError(
                f"--tensor-type {each.argument} matches no matrix that is quantized.",
                f"Names are such as {min(shapes)}; rank head, embedding and norms have fixed types." if shapes else "",
            )
        if all(chosen[name] is not each and chosen[name].is_in_file == each.is_in_file for name in names):
            raise UsageError(
                f"--tensor-type {each.argument} has no effect: earlier patterns match {names[0]} first.",
                "Put the narrower pattern first.",
            )
    for name, each in chosen.items():
        if shapes[name][-1] % each.type.block:
            raise UsageError(
                f"--tensor-type {each.argument}: {name} has {shapes[name][-1]} columns, no multiple of {each.type.block}.",
                "Choose a type with smaller blocks, such as q8_0.",
            )


def chosen_types(types: Sequence[TensorType], names: Mapping[str, object]) -> Mapping[str, TensorType]:
    """What decides each matrix that a pattern matches: the first that does."""
    found = {name: next(_matching(types, name), None) for name in names if name not in (RANK_HEAD, TOKEN_EMBEDDING)}
    return {name: each for name, each in found.items() if each is not None}


def _matching(types: Sequence[TensorType], name: str) -> Iterator[TensorType]:
    return (each for each in types if re.search(each.pattern, name))
