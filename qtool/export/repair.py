"""`repair_gguf`: adds to a GGUF file what it lacks to rank, usually without the base weights."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGUFValueType, PoolingType
from typing_extensions import override

from qtool.arch.prompts import ANSWERS, NO, YES, PromptSpec
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact, require_family
from qtool.errors import ModelError, UsageError
from qtool.export.gguf_metadata import (
    NAMES_KEY,
    rank_prompt,
    task_metadata,
    token_id,
)
from qtool.export.gguf_plan import Inventory, PlannedGgufTensor, take_inventory
from qtool.export.sources import Rows, StoredRows, StoredTensor, encode_rows
from qtool.export.tensor_writer import TensorSource, write_tensors
from qtool.formats.ggml import F32, FLOAT_TYPES, GGML_TYPES, GgmlType
from qtool.jsonfile import json_bytes
from qtool.manifest import manifest, versions
from qtool.options import Options
from qtool.progress import Meter, Progress, ignore
from qtool.results import Result, counted
from qtool.storage.atomic import check_target_file, manifest_of, require_space, staged_files
from qtool.storage.checkpoint import TensorInfo
from qtool.storage.gguf import GgufFile, GgufTensor, Value, array, encode_string, encode_value, string
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out_encoded
from qtool.storage.gguf_model import (
    OUTPUT,
    RANK_HEAD,
    RERANK_KEY,
    TOKEN_EMBEDDING,
    TOKENS_KEY,
    GgufModel,
    open_gguf_file,
)
from qtool.storage.head_rows import (
    HeadOrder,
    answer_matrix,
    decoded_rows,
    distance,
    head_order,
    tokens_of_head,
    tolerance,
)
from qtool.storage.hub import resolve
from qtool.storage.output_files import FileLayout

# The rank head: added, reordered, or taken from a base. Rows that equal the vocabulary's yes and no keep their bytes;
# for other rows the labels decide which is yes, and without labels that say so there is no repair.

_AGAIN: Final = "Convert the original again."


@dataclass(frozen=True)
class RepairedHead:
    """The head to write, and a sentence about what changed."""

    tensor: PlannedGgufTensor
    change: str


@dataclass(frozen=True)
class _Base:
    """A checkpoint with the trained rows; `answers` are the ids of yes and no."""

    name: str
    inventory: Inventory
    answers: tuple[int, int]


@dataclass(frozen=True)
class _File:
    """The file under repair: its header, its path, and the base that it was made from."""

    model: GgufModel
    base: _Base | None
    tokens: Sequence[str]


def repaired_head(model: GgufModel, base: str | None) -> RepairedHead | None:
    """The head that `gguf` needs; None where its own is correct."""
    file = _File(model, _open_base(base) if base is not None else None, model.texts(TOKENS_KEY))
    if file.base is not None:
        _require_its_base(file, file.base)
    present = model.tensors.get(RANK_HEAD)
    if present is None:
        return _rebuilt(file, "was missing")
    if present.shape[0] != 2:
        raise ModelError(
            f"{model.target}: {RANK_HEAD} has {present.shape[0]} rows; expected 2, for yes and no.", _AGAIN
        )
    if file.base is not None and present.type not in FLOAT_TYPES:
        return _rebuilt(file, f"was stored as {present.type.name}")
    order = head_order(model, ANSWERS)
    if order is HeadOrder.EXCHANGED:
        return _exchanged(file, present, "held the rows of no and yes")
    return None if order is HeadOrder.RIGHT else _of_its_own(file, present)


def _of_its_own(file: _File, head: GgufTensor) -> RepairedHead | None:
    """For a head other than the vocabulary's yes and no: other tokens' rows are wrong, trained rows are intended."""
    words = _words_of(file, head)
    if any(words):
        return _rebuilt(file, f"held the rows of {' and '.join(map(_named, words))}")
    labels = list(file.model.texts(file.model.key("classifier.output_labels")))
    if labels == [NO, YES]:  # labels and rows are exchanged together, so that yes keeps its row
        return _exchanged(file, head, "had the row of no before that of yes, as its labels say")
    if labels not in ([], [YES, NO]):
        raise ModelError(
            f"{file.model.target}: The rows of {RANK_HEAD} are labelled {labels} and are not those of any token, so it is "
            "unknown which of them means yes.",
            _AGAIN,
        )
    return None


def _words_of(file: _File, head: GgufTensor) -> list[str | None]:
    """The token that each row of the head belongs to, if any."""
    matrix = answer_matrix(file.model)
    if matrix is None:
        return [None, None]
    return [None if t is None else _text(file.tokens, t) for t in tokens_of_head(file.model, head, matrix)]


def _text(tokens: Sequence[str], token: int) -> str:
    return tokens[token] if token < len(tokens) else f"token {token}"


def _named(word: str | None) -> str:
    return "no token" if word is None else repr(word)


def _exchanged(file: _File, head: GgufTensor, problem: str) -> RepairedHead:
    """Its own rows in the other order, byte for byte: they may be stored better than the vocabulary's."""
    exchanged = _planned(head.type, head.shape[1], partial(StoredRows, file.model, head, (1, 0)))
    return RepairedHead(exchanged, f"{RANK_HEAD} {problem}, and holds those of yes and no.")


def _planned(kind: GgmlType, width: int, source: Callable[[str, GgmlType], TensorSource]) -> PlannedGgufTensor:
    output = GgufOutputTensor(RANK_HEAD, kind, (2, width), kind.nbytes(2 * width))
    return PlannedGgufTensor(output, source(RANK_HEAD, kind))


def _rebuilt(file: _File, problem: str) -> RepairedHead:
    """The rows of yes and no from the base, or from the file's own head or tied embedding."""
    head = _head_of_base(file.base) if file.base is not None else _head_of_file(file)
    origin = head.source.tensor.gguf_name if isinstance(head.source, StoredRows) else "the base"
    rows, kind = f"[2, {head.output.shape[1]}]", head.output.type.name
    return RepairedHead(head, f"{RANK_HEAD} {problem}; now it is {rows}, the yes and no rows of {origin} as {kind}.")


def _open_base(base: str) -> _Base:
    source = resolve(base)
    declared = CheckpointArtefact(source).detection
    if declared.task is Task.EMBED:
        raise UsageError(
            f"--base {base} is an embedder ({declared.task_source}); expected a reranker.",
            "Pass the reranker that the file was made from.",
        )
    opened = CheckpointArtefact(source, Task.RERANK)
    inventory = take_inventory(opened.checkpoint, opened.detection)
    return _Base(base, inventory, (token_id(opened.tokenizer, YES), token_id(opened.tokenizer, NO)))


def _require_its_base(file: _File, base: _Base) -> None:
    """Raise ModelError unless width, vocabulary and the rows of yes and no are those of the base."""
    model, width = file.model, file.model.integer(file.model.key("embedding_length"))
    words = [file.tokens[token : token + 1] for token in base.answers]
    if base.inventory.head.shape[1] != width or words != [[YES], [NO]]:
        raise ModelError(f"{model.target} was not made from --base {base.name}: width or vocabulary differ.")
    for gguf_name, info in ((TOKEN_EMBEDDING, base.inventory.embedding), (OUTPUT, base.inventory.head)):
        stored = model.tensors.get(gguf_name)
        if stored is not None and not _agree(file, stored, base, info):
            raise ModelError(
                f"{model.target} was not made from --base {base.name}: the rows of yes and no in {gguf_name} differ.",
                "Pass the checkpoint that it was made from, or remove --base to use the rows in the file.",
            )


def _agree(file: _File, stored: GgufTensor, base: _Base, info: TensorInfo) -> bool:
    """Whether the rows of yes and no are equal within the precision of their types."""
    if stored.shape[1:] != info.shape[1:] or max(base.answers) >= stored.shape[0]:
        return False
    found = decoded_rows(file.model, stored, base.answers)
    trained = encode_rows(base.inventory.checkpoint, info, base.answers, F32).view(np.float32).reshape(2, -1)
    return found is None or distance(found, trained) <= tolerance(stored.type, _type_of(info))


def _type_of(info: TensorInfo) -> GgmlType:
    return next(each for each in GGML_TYPES.values() if each.name == info.dtype)


def _head_of_base(base: _Base) -> PlannedGgufTensor:
    head = base.inventory.head
    return _planned(_type_of(head), head.shape[1], partial(Rows, base.inventory.checkpoint, head, base.answers))


def _head_of_file(file: _File) -> PlannedGgufTensor:
    matrix = answer_matrix(file.model)
    if matrix is None:
        raise ModelError(
            f"{file.model.target} has neither {OUTPUT} nor {TOKEN_EMBEDDING}, which contain the rows of yes and no."
        )
    rows = tuple(_token_row(file, text, matrix.shape[0]) for text in (YES, NO))
    kind = matrix.type if matrix.type in FLOAT_TYPES else F32
    return _planned(kind, matrix.shape[1], partial(StoredRows, file.model, matrix, rows))


def _token_row(file: _File, text: str, rows: int) -> int:
    if text not in file.tokens or file.tokens.index(text) >= rows:
        raise ModelError(f"{file.model.target} has no token {text!r}, which the rank head needs.")
    return int(file.tokens.index(text))


# The repair. What is missing comes from the file itself, the base or the family's published data; every other byte
# stays.

_SCHEMES: Final = ("hf:", "https:", "http:")
_SHORTEST_ADDRESS: Final = 4  # hf://ORG/NAME/FILE


@dataclass(frozen=True, kw_only=True)
class RepairOptions(Options):
    """The options of `qtool repair-gguf`; `base` is a checkpoint with the trained rows of the head."""

    broken: Path
    output: Path
    base: str | None = None
    task: Task | None = None
    instruction: str | None = None
    force: bool = False


@dataclass(frozen=True, repr=False)
class RepairSummary(Result):
    """The changes, one sentence each."""

    changes: tuple[str, ...]
    nbytes: int

    @property
    @override
    def headline(self) -> str:
        return f"{counted(len(self.changes), 'change')} in a file of {self.nbytes:,} bytes."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [{"change": change} for change in self.changes]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, "changes": list(self.changes), "nbytes": self.nbytes}


@dataclass(frozen=True)
class _Repair:
    """The fields to set, the rank head to write (None to keep it), and the changes in words."""

    fields: Mapping[str, Value]
    head: PlannedGgufTensor | None
    changes: tuple[str, ...]


def repair_gguf(options: RepairOptions, progress: Progress = ignore) -> RepairSummary:
    """Write `options.fixed`: the file `options.broken` with all that its task needs. Raises QtoolError."""
    _require_file(options.broken)
    check_target_file(options.output, force=options.force)
    model = open_gguf_file(options.broken)
    repair = _plan(model, options)
    if not repair.changes:
        raise UsageError(
            f"Nothing to repair: {options.broken} has everything that the task {_task(model, options).value} needs."
        )
    tensors = list(_tensors(model, repair.head))
    layout = _lay_out(model.header, repair.fields, options.output.name, tensors)
    require_space(options.output, layout.nbytes)
    with staged_files(options.output, force=options.force) as folder:
        sources = [tensor.source for tensor in tensors]
        meter = Meter(sum(source.work_bytes for source in sources), progress)
        hashes = write_tensors([layout], sources, folder, meter.advance, hash_tensors=True)
        (folder / manifest_of(options.output).name).write_bytes(json_bytes(_manifest(repair, hashes)))
    return RepairSummary(repair.changes, layout.nbytes)


def _require_file(path: Path) -> None:
    """Raise UsageError unless `path` is a local file: its weights are copied."""
    if path.is_file():
        return
    if path.is_dir():
        names = sorted(each.name for each in path.glob("*.gguf"))
        raise UsageError(
            f"{path} is a folder; expected a GGUF file.",
            f"Pass one file, such as {path / (names[0] if names else 'FILE.gguf')}.",
        )
    if path.parts[:1] and path.parts[0] in _SCHEMES:
        raise UsageError(
            "repair-gguf needs a local file, not an address.", f"Download it first: {_download_command(path)}"
        )
    if not path.exists():
        raise UsageError(f"No such file: {path}.", "Pass a local GGUF file; `hf download ORG/NAME FILE` downloads one.")


def _download_command(path: Path) -> str:
    """The command that downloads an `hf://` address, of which Path has removed one slash."""
    if path.parts[0] != _SCHEMES[0] or len(path.parts) < _SHORTEST_ADDRESS:
        return "hf download ORG/NAME FILE.gguf --local-dir ."
    repo, _, revision = "/".join(path.parts[1:3]).partition("@")
    at = ["--revision", revision] if revision else []
    return shlex.join(["hf", "download", repo, "/".join(path.parts[3:]), *at, "--local-dir", "."])


def _plan(model: GgufModel, options: RepairOptions) -> _Repair:
    if (model.integer("split.count") or 1) > 1 or len(model.parts) + len(model.missing_parts) > 1:
        raise ModelError(
            f"{options.broken} is one of several parts.", "Merge them first: llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    family, task = require_family(model), _task(model, options)
    if task is Task.EMBED and options.base is not None:
        raise UsageError(
            "--base cannot be combined with the task embed: an embedder has no rank head.",
            "Remove --base or --task embed.",
        )
    wanted = dict(task_metadata(family.gguf_architecture, task))
    head = None
    if task is Task.RERANK:
        head = repaired_head(model, options.base)
        wanted |= _template_fields(model, family.reranker, options)
    changed = {key: value for key, value in wanted.items() if model.metadata.get(key) != value}
    changes = (*((head.change,) if head else ()), *_field_changes(model.metadata, changed))
    return _Repair(changed, head.tensor if head else None, changes)


def _task(model: GgufModel, options: RepairOptions) -> Task:
    """The task of the option, else that of the file's pooling, else rerank."""
    if options.task is not None:
        return options.task
    pooling = model.integer(model.key("pooling_type"))
    return Task.EMBED if pooling == PoolingType.LAST and RANK_HEAD not in model.tensors else Task.RERANK


def _template_fields(model: GgufModel, official: PromptSpec, options: RepairOptions) -> dict[str, Value]:
    names = sorted({*model.texts(NAMES_KEY), "rerank"})
    instruction = options.instruction or official.instruction_in(model.text(RERANK_KEY) or "")
    template = rank_prompt(official, "official", instruction)
    return {RERANK_KEY: string(template), NAMES_KEY: array(GGUFValueType.STRING, names)}


def _field_changes(present: Mapping[str, Value], fields: Mapping[str, Value]) -> Iterator[str]:
    for key, value in fields.items():
        old = present.get(key)
        was = "was missing" if old is None else f"was {_short(old.data)}"
        yield f"{key} {was}; now it is {_short(value.data)}."


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"


def _tensors(model: GgufModel, head: PlannedGgufTensor | None) -> Iterator[PlannedGgufTensor]:
    """All tensors as they were, except the head: in its place, or before all others where there was none."""
    if head is not None and RANK_HEAD not in model.tensors:
        yield head
    for tensor in model.tensors.values():
        if head is not None and tensor.gguf_name == RANK_HEAD:
            yield head
            continue
        output = GgufOutputTensor(tensor.gguf_name, tensor.type, tensor.shape, tensor.nbytes)
        yield PlannedGgufTensor(output, StoredTensor(model, tensor))


def _lay_out(
    gguf: GgufFile, fields: Mapping[str, Value], file_name: str, tensors: list[PlannedGgufTensor]
) -> FileLayout:
    """The fields byte for byte as they were, except those that change (in their places) and new ones (at the end)."""
    raw = _field_bytes(gguf)
    encoded = {key: encode_string(key) + encode_value(value) for key, value in fields.items()}
    merged = {**raw, **encoded}
    outputs = [tensor.output for tensor in tensors]
    return lay_out_encoded(file_name, b"".join(merged.values()), len(merged), outputs, gguf.alignment)


def _field_bytes(gguf: GgufFile) -> dict[str, bytes]:
    with Path(gguf.name).open("rb") as file:
        header = file.read(max((end for _, end in gguf.field_spans.values()), default=0))
    return {key: header[start:end] for key, (start, end) in gguf.field_spans.items()}


def _manifest(repair: _Repair, hashes: Mapping[str, str]) -> Mapping[str, Any]:
    return manifest(
        "repair-gguf", versions=versions("numpy", "gguf"), changes=list(repair.changes), sha256=dict(hashes)
    )
