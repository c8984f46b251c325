"""The rank head of a file under repair: added, put into the right order, or taken from a base.

Rule: a head's rows and its labels keep their meaning. What matches the vocabulary's yes and no stays byte for byte, what
is of its own follows its labels, and where nothing says which row is yes there is no repair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from qtool.arch.detect import detect
from qtool.arch.prompts import NO, YES
from qtool.arch.spec import Task
from qtool.checkpoint.reader import TensorInfo, open_checkpoint
from qtool.checkpoint.source import resolve
from qtool.convert.names import OUTPUT, RANK_HEAD, TOKEN_EMBEDDING
from qtool.convert.plan import Inventory, PlannedTensor, take_inventory
from qtool.convert.sources import Rows, TensorSource
from qtool.convert.stored import StoredRows
from qtool.convert.tokenizer import read_tokenizer, token_id
from qtool.errors import ModelError, UsageError
from qtool.formats.ggml import BF16, F16, F32, GGML_TYPES, GgmlType
from qtool.gguf_file.head_rows import (
    TOKENS_KEY,
    HeadOrder,
    answer_matrix,
    distance,
    head_order,
    read_rows,
    tokens_of_head,
    tolerance,
)
from qtool.gguf_file.layout import OutputTensor
from qtool.gguf_file.reader import GgufFile, GgufTensor

_EXACT: Final = (F32, F16, BF16)
_AGAIN: Final = "Convert the original again."


@dataclass(frozen=True)
class RepairedHead:
    """The head to write, and in a sentence what is new about it."""

    tensor: PlannedTensor
    change: str


@dataclass(frozen=True)
class _Base:
    """A checkpoint with the rows as they were trained; `answers` are the ids of yes and no."""

    name: str
    inventory: Inventory
    answers: tuple[int, int]


@dataclass(frozen=True)
class _File:
    """The file under repair: its header, where it lies, and the base that it was made from."""

    gguf: GgufFile
    path: Path
    base: _Base | None
    tokens: Sequence[str]

    def read(self, tensor: GgufTensor, start: int, nbytes: int) -> bytes:
        """Some bytes of a tensor."""
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), nbytes, tensor.offset + start)


def repaired_head(gguf: GgufFile, path: Path, base: str | None) -> RepairedHead | None:
    """The head that `gguf` needs; None where its own is right."""
    file = _File(gguf, path, _open_base(base) if base is not None else None, gguf.get(TOKENS_KEY, []))
    if file.base is not None:
        _require_its_base(file, file.base)
    present = gguf.tensors.get(RANK_HEAD)
    if present is None:
        return _rebuilt(file, "was missing")
    _require_rankable_width(gguf, present)
    if file.base is not None and present.type not in _EXACT:
        return _rebuilt(file, f"was stored as {present.type.name}")
    order = head_order(gguf.tensors, file.tokens, file.read)
    if order is HeadOrder.EXCHANGED:
        return _exchanged(file, present, "held the rows of no and yes")
    return None if order is HeadOrder.RIGHT else _of_its_own(file, present)


def _require_rankable_width(gguf: GgufFile, head: GgufTensor) -> None:
    if head.shape[0] != 2:
        raise ModelError(f"{gguf.name}: {RANK_HEAD} has {head.shape[0]} rows; yes and no are two.", _AGAIN)


def _of_its_own(file: _File, head: GgufTensor) -> RepairedHead | None:
    """A head that is not the vocabulary's yes and no: other tokens' rows are a mistake, trained ones are meant so."""
    words = _words_of(file, head)
    if any(words):
        return _rebuilt(file, f"held the rows of {' and '.join(map(_named, words))}")
    labels = file.gguf.get(f"{file.gguf.get('general.architecture')}.classifier.output_labels")
    if labels == [NO, YES]:  # kept with its rows, so that the one that meant yes still does
        return _exchanged(file, head, "held no before yes, as its labels say")
    if labels not in (None, [YES, NO]):
        raise ModelError(
            f"{file.gguf.name}: the rows of {RANK_HEAD} are labelled {labels} and are no rows of its vocabulary: nothing "
            "says which of them means yes.",
            _AGAIN,
        )
    return None


def _words_of(file: _File, head: GgufTensor) -> list[str | None]:
    """Of each row of the head the token that it is the row of."""
    matrix = answer_matrix(file.gguf.tensors)
    if matrix is None:
        return [None, None]
    return [None if t is None else _text(file.tokens, t) for t in tokens_of_head(head, matrix, file.read)]


def _text(tokens: Sequence[str], token: int) -> str:
    return tokens[token] if token < len(tokens) else f"token {token}"


def _named(word: str | None) -> str:
    return "no token" if word is None else repr(word)


def _exchanged(file: _File, head: GgufTensor, problem: str) -> RepairedHead:
    """Its own rows in the other order: byte for byte, since they may be better than the vocabulary's."""
    exchanged = _planned(head.type, head.shape[1], StoredRows(file.path, head, (1, 0)))
    return RepairedHead(exchanged, f"{RANK_HEAD} {problem}, and holds those of yes and no.")


def _planned(kind: GgmlType, width: int, source: TensorSource) -> PlannedTensor:
    return PlannedTensor(OutputTensor(RANK_HEAD, kind, (2, width), kind.nbytes(2 * width)), source)


def _rebuilt(file: _File, problem: str) -> RepairedHead:
    """The answers' rows of the base, else of the file's own head or of the embedding that is tied to it."""
    head = _head_of_base(file.base) if file.base is not None else _head_of_file(file)
    origin = head.source.tensor.gguf_name if isinstance(head.source, StoredRows) else "the base"
    rows, kind = f"[2, {head.output.shape[1]}]", head.output.type.name
    return RepairedHead(head, f"{RANK_HEAD} {problem}, is {rows}: the yes and no rows of {origin}, as {kind}.")


def _open_base(base: str) -> _Base:
    directory = resolve(base).directory
    declared = detect(directory)
    if declared.task is Task.EMBED:
        raise UsageError(
            f"{base} is an embedder ({declared.task_source}), whose rows of yes and no answer nothing.",
            "Pass the reranker that the file was made from.",
        )
    tokenizer = read_tokenizer(directory)
    inventory = take_inventory(open_checkpoint(directory), detect(directory, Task.RERANK))
    return _Base(base, inventory, (token_id(tokenizer, YES), token_id(tokenizer, NO)))


def _require_its_base(file: _File, base: _Base) -> None:
    """Raise ModelError unless the file can have been made from the base: whose rows of yes and no it then still has."""
    gguf, width = file.gguf, file.gguf.get(f"{file.gguf.get('general.architecture')}.embedding_length")
    words = [file.tokens[token : token + 1] for token in base.answers]
    if base.inventory.head.shape[1] != width or words != [[YES], [NO]]:
        raise ModelError(f"{base.name} is not what {gguf.name} was made from: width or vocabulary differ.")
    for gguf_name, info in ((TOKEN_EMBEDDING, base.inventory.embedding), (OUTPUT, base.inventory.head)):
        stored = gguf.tensors.get(gguf_name)
        if stored is not None and not _agree(file, stored, base, info):
            raise ModelError(
                f"{base.name} is not what {gguf.name} was made from: their rows of yes and no differ in {gguf_name}.",
                "Pass the checkpoint it was made from, or leave --base out: the file has rows of its own.",
            )


def _agree(file: _File, stored: GgufTensor, base: _Base, info: TensorInfo) -> bool:
    """Whether the answers' rows are the same, as far as the types in which they are stored can tell."""
    if stored.shape[1:] != info.shape[1:] or max(base.answers) >= stored.shape[0]:
        return False
    found = read_rows(stored, base.answers, file.read)
    trained = Rows(base.inventory.checkpoint, info, base.answers).encode(F32).view(np.float32).reshape(2, -1)
    return found is None or distance(found, trained) <= tolerance(stored.type, _type_of(info))


def _type_of(info: TensorInfo) -> GgmlType:
    return next(each for each in GGML_TYPES.values() if each.name == info.dtype)


def _head_of_base(base: _Base) -> PlannedTensor:
    head = base.inventory.head
    return _planned(_type_of(head), head.shape[1], Rows(base.inventory.checkpoint, head, base.answers))


def _head_of_file(file: _File) -> PlannedTensor:
    matrix = answer_matrix(file.gguf.tensors)
    if matrix is None:
        raise ModelError(
            f"{file.gguf.name} has neither {OUTPUT} nor {TOKEN_EMBEDDING}: the answers' rows are not in it."
        )
    rows = tuple(_token_row(file, text, matrix.shape[0]) for text in (YES, NO))
    kind = matrix.type if matrix.type in _EXACT else F32
    return _planned(kind, matrix.shape[1], StoredRows(file.path, matrix, rows))


def _token_row(file: _File, text: str, rows: int) -> int:
    if text not in file.tokens or file.tokens.index(text) >= rows:
        raise ModelError(f"{file.gguf.name} has no single token {text!r}: such a model cannot answer with it.")
    return int(file.tokens.index(text))
