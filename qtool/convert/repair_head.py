"""The rank head of a file under repair: added, put into the right order, or taken from a base.

Rule: a head's rows and its labels keep their meaning. What matches the vocabulary's yes and no stays byte for byte, what
is of its own follows its labels, and where nothing says which row is yes there is no repair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qtool.arch.detect import detect
from qtool.arch.prompts import NO, YES
from qtool.arch.spec import Task
from qtool.checkpoint.reader import open_checkpoint
from qtool.checkpoint.source import resolve
from qtool.convert.names import OUTPUT, RANK_HEAD, TOKEN_EMBEDDING
from qtool.convert.plan import PlannedTensor, take_inventory
from qtool.convert.sources import Rows
from qtool.convert.stored import StoredRows
from qtool.convert.tokenizer import read_tokenizer, token_id
from qtool.errors import ModelError
from qtool.formats.ggml import BF16, F16, F32, GGML_TYPES
from qtool.gguf_file.head_rows import HeadOrder, head_order, tokens_of_head
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
class _File:
    """The file under repair: its header, where it lies, and the name of the base that it was made from."""

    gguf: GgufFile
    path: Path
    base: str | None
    tokens: Sequence[str] = field(default_factory=list)

    def read(self, tensor: GgufTensor, start: int, nbytes: int) -> bytes:
        """Some bytes of a tensor."""
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), nbytes, tensor.offset + start)


def repaired_head(gguf: GgufFile, path: Path, base: str | None) -> RepairedHead | None:
    """The head that `gguf` needs; None where its own is right."""
    file = _File(gguf, path, base, gguf.get("tokenizer.ggml.tokens", []))
    present = gguf.tensors.get(RANK_HEAD)
    if present is None:
        return _rebuilt(file, "was missing")
    _require_rankable_width(gguf, present)
    if base is not None and present.type not in _EXACT:
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
    matrix = file.gguf.tensors.get(OUTPUT) or file.gguf.tensors.get(TOKEN_EMBEDDING)
    if matrix is None or len(matrix.shape) != 2:
        return [None, None]
    return [None if t is None else _text(file.tokens, t) for t in tokens_of_head(head, matrix, file.read)]


def _text(tokens: Sequence[str], token: int) -> str:
    return tokens[token] if token < len(tokens) else f"token {token}"


def _named(word: str | None) -> str:
    return "no token" if word is None else repr(word)


def _exchanged(file: _File, head: GgufTensor, problem: str) -> RepairedHead:
    """Its own rows in the other order: byte for byte, since they may be better than the vocabulary's."""
    output = OutputTensor(RANK_HEAD, head.type, head.shape, head.nbytes)
    source = StoredRows(file.path, head, (1, 0))
    return RepairedHead(PlannedTensor(output, source), f"{RANK_HEAD} {problem}, and holds those of yes and no.")


def _rebuilt(file: _File, problem: str) -> RepairedHead:
    """The answers' rows of the base, else of the file's own head or of the embedding that is tied to it."""
    head = _head_of_base(file, file.base) if file.base is not None else _head_of_file(file)
    origin = head.source.tensor.gguf_name if isinstance(head.source, StoredRows) else "the base"
    rows, kind = f"[2, {head.output.shape[1]}]", head.output.type.name
    return RepairedHead(head, f"{RANK_HEAD} {problem}, is {rows}: the yes and no rows of {origin}, as {kind}.")


def _head_of_base(file: _File, base: str) -> PlannedTensor:
    gguf, directory = file.gguf, resolve(base).directory
    inventory = take_inventory(open_checkpoint(directory), detect(directory, Task.RERANK))
    width, head = gguf.get(f"{gguf.get('general.architecture')}.embedding_length"), inventory.head
    tokenizer = read_tokenizer(directory)
    answers = token_id(tokenizer, YES), token_id(tokenizer, NO)
    if head.shape[1] != width or [file.tokens[i : i + 1] for i in answers] != [[YES], [NO]]:
        raise ModelError(f"{base} is not what {gguf.name} was made from: width or vocabulary differ.")
    kind = next(each for each in GGML_TYPES.values() if each.name == head.dtype)
    output = OutputTensor(RANK_HEAD, kind, (2, width), kind.nbytes(2 * width))
    return PlannedTensor(output, Rows(inventory.checkpoint, head, answers))


def _head_of_file(file: _File) -> PlannedTensor:
    head = file.gguf.tensors.get(OUTPUT) or file.gguf.tensors.get(TOKEN_EMBEDDING)
    if head is None or len(head.shape) != 2:
        raise ModelError(
            f"{file.gguf.name} has neither {OUTPUT} nor {TOKEN_EMBEDDING}: the answers' rows are not in it."
        )
    rows = tuple(_token_row(file, text, head.shape[0]) for text in (YES, NO))
    kind = head.type if head.type in _EXACT else F32
    output = OutputTensor(RANK_HEAD, kind, (2, head.shape[1]), kind.nbytes(2 * head.shape[1]))
    return PlannedTensor(output, StoredRows(file.path, head, rows))


def _token_row(file: _File, text: str, rows: int) -> int:
    if text not in file.tokens or file.tokens.index(text) >= rows:
        raise ModelError(f"{file.gguf.name} has no single token {text!r}: such a model cannot answer with it.")
    return int(file.tokens.index(text))
