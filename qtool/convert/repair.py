"""`repair_gguf`: gives a GGUF file what it lacks to rank, without the base weights.

Rule: what is repaired is rebuilt from the file itself or from the family's published data; every other byte stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf.constants import PoolingType

from qtool.arch.detect import detect
from qtool.arch.prompts import NO, YES, reranker_prompt
from qtool.arch.spec import Task
from qtool.checkpoint.reader import open_checkpoint
from qtool.checkpoint.source import resolve
from qtool.checkpoint.writer import check_target_file, manifest_of, require_space, staged_files
from qtool.convert.engine import write_tensors
from qtool.convert.metadata import task_metadata
from qtool.convert.names import OUTPUT, RANK_HEAD, TOKEN_EMBEDDING
from qtool.convert.plan import PlannedTensor, take_inventory
from qtool.convert.sources import Rows
from qtool.convert.stored import Stored, StoredRows
from qtool.convert.templates import NAMES_KEY, RERANK_KEY, baked_instruction, rank_prompt
from qtool.convert.tokenizer import read_tokenizer, token_id
from qtool.errors import ModelError, UsageError
from qtool.formats.ggml import BF16, F16, F32, GGML_TYPES
from qtool.gguf_file.layout import GgufLayout, OutputTensor, lay_out_encoded
from qtool.gguf_file.reader import GgufFile, read_gguf
from qtool.gguf_file.values import Kind, Value, array, encode_string, encode_value, string
from qtool.jsonfile import json_bytes
from qtool.manifest import manifest, versions
from qtool.progress import Meter, Progress, no_progress

FAMILIES: Final[Mapping[str, bool]] = {"qwen3": False, "qwen3vl": True}
"""Known architectures, and whether each sees pictures."""

_EXACT: Final = (F32, F16, BF16)


@dataclass(frozen=True)
class RepairOptions:
    """What `qtool repair-gguf` is asked to do; `base` is a checkpoint with the head's rows as they were trained."""

    broken: Path
    fixed: Path
    base: str | None = None
    task: Task | None = None
    instruction: str | None = None
    force: bool = False


@dataclass(frozen=True)
class RepairSummary:
    """What was changed, a sentence each."""

    changes: tuple[str, ...]
    nbytes: int

    def to_json(self) -> Mapping[str, Any]:
        """The summary as `--json` prints it."""
        return {"schema_version": 1, "changes": list(self.changes), "nbytes": self.nbytes}


@dataclass(frozen=True)
class _Repair:
    """Fields to set, tensors to put first, and why."""

    fields: Mapping[str, Value]
    tensors: tuple[PlannedTensor, ...]
    changes: tuple[str, ...]


def repair_gguf(options: RepairOptions, progress: Progress = no_progress) -> RepairSummary:
    """Write `options.fixed`: the file `options.broken` with all that its task needs."""
    check_target_file(options.fixed, force=options.force)
    gguf = read_gguf(options.broken)
    repair = _plan(gguf, options)
    if not repair.changes:
        raise UsageError(f"{options.broken} lacks nothing that it needs to {_task(gguf, options).value}.")
    tensors = [*repair.tensors, *_kept(gguf, options.broken, {t.output.gguf_name for t in repair.tensors})]
    layout = _lay_out(gguf, repair.fields, options.fixed.name, tensors)
    require_space(options.fixed, layout.nbytes)
    with staged_files(options.fixed, force=options.force) as folder:
        meter = Meter(sum(tensor.source.work_bytes for tensor in tensors), progress)
        hashes = write_tensors([layout], tensors, folder, meter.advance)
        (folder / manifest_of(options.fixed).name).write_bytes(json_bytes(_manifest(repair, hashes)))
    return RepairSummary(repair.changes, layout.nbytes)


def _plan(gguf: GgufFile, options: RepairOptions) -> _Repair:
    architecture = gguf.get("general.architecture")
    if architecture not in FAMILIES:
        raise ModelError(f"{gguf.name} is a {architecture!r} model; qtool repairs {' and '.join(FAMILIES)} rankers.")
    if gguf.get("split.count", 1) > 1:
        raise ModelError(f"{gguf.name} is one part of several.", "Put them together: llama-gguf-split --merge.")
    task = _task(gguf, options)
    wanted = dict(task_metadata(architecture, task))
    heads: tuple[PlannedTensor, ...] = ()
    if task is Task.RERANK:
        _require_rankable_width(gguf)
        heads = tuple(_missing_head(gguf, options))
        wanted |= _template_fields(gguf, options)
    changed = {key: value for key, value in wanted.items() if gguf.metadata.get(key) != value}
    return _Repair(changed, heads, (*(_head_change(head) for head in heads), *_field_changes(gguf, changed)))


def _task(gguf: GgufFile, options: RepairOptions) -> Task:
    """What the file is to do: as asked, else as its pooling says, else to rank."""
    if options.task is not None:
        return options.task
    pooling = gguf.get(f"{gguf.get('general.architecture')}.pooling_type")
    return Task.EMBED if pooling == PoolingType.LAST and RANK_HEAD not in gguf.tensors else Task.RERANK


def _require_rankable_width(gguf: GgufFile) -> None:
    if RANK_HEAD in gguf.tensors and gguf.tensors[RANK_HEAD].shape[0] != 2:
        rows = gguf.tensors[RANK_HEAD].shape[0]
        raise ModelError(
            f"{gguf.name}: {RANK_HEAD} has {rows} rows; yes and no are two.", "Convert the original again."
        )


def _missing_head(gguf: GgufFile, options: RepairOptions) -> Iterator[PlannedTensor]:
    """The answers' rows of the vocabulary head, or of the embedding where the two are tied."""
    present = gguf.tensors.get(RANK_HEAD)
    if options.base is not None and (present is None or present.type not in _EXACT):
        yield _head_of_base(gguf, options.base)
    elif present is None:
        yield _head_of_file(gguf, options.broken)


def _head_of_base(gguf: GgufFile, base: str) -> PlannedTensor:
    directory = resolve(base).directory
    inventory = take_inventory(open_checkpoint(directory), detect(directory, Task.RERANK))
    width, head = gguf.get(f"{gguf.get('general.architecture')}.embedding_length"), inventory.head
    tokens = gguf.get("tokenizer.ggml.tokens", [])
    tokenizer = read_tokenizer(directory)
    answers = token_id(tokenizer, YES), token_id(tokenizer, NO)
    if head.shape[1] != width or [tokens[i : i + 1] for i in answers] != [[YES], [NO]]:
        raise ModelError(f"{base} is not what {gguf.name} was made from: width or vocabulary differ.")
    kind = next(each for each in GGML_TYPES.values() if each.name == head.dtype)
    output = OutputTensor(RANK_HEAD, kind, (2, width), kind.nbytes(2 * width))
    return PlannedTensor(output, Rows(inventory.checkpoint, head, answers))


def _head_of_file(gguf: GgufFile, path: Path) -> PlannedTensor:
    head = gguf.tensors.get(OUTPUT) or gguf.tensors.get(TOKEN_EMBEDDING)
    if head is None or len(head.shape) != 2:
        raise ModelError(f"{gguf.name} has neither {OUTPUT} nor {TOKEN_EMBEDDING}: the answers' rows are not in it.")
    rows = tuple(_token_row(gguf, text, head.shape[0]) for text in (YES, NO))
    kind = head.type if head.type in _EXACT else F32
    output = OutputTensor(RANK_HEAD, kind, (2, head.shape[1]), kind.nbytes(2 * head.shape[1]))
    return PlannedTensor(output, StoredRows(path, head, rows))


def _token_row(gguf: GgufFile, text: str, rows: int) -> int:
    tokens = gguf.get("tokenizer.ggml.tokens", [])
    if text not in tokens or tokens.index(text) >= rows:
        raise ModelError(f"{gguf.name} has no single token {text!r}: such a model cannot answer with it.")
    return int(tokens.index(text))


def _template_fields(gguf: GgufFile, options: RepairOptions) -> dict[str, Value]:
    official = reranker_prompt(is_vision=FAMILIES[gguf.get("general.architecture")])
    names = sorted({*gguf.get(NAMES_KEY, []), "rerank"})
    instruction = options.instruction or baked_instruction(gguf.get(RERANK_KEY, ""), official)
    template = rank_prompt(official, "official", instruction)
    return {RERANK_KEY: string(template), NAMES_KEY: array(Kind.STRING, names)}


def _head_change(head: PlannedTensor) -> str:
    source = head.source
    origin = source.tensor.gguf_name if isinstance(source, StoredRows) else "the base"
    return (
        f"{RANK_HEAD} [2, {head.output.shape[1]}] added: the yes and no rows of {origin}, as {head.output.type.name}."
    )


def _field_changes(gguf: GgufFile, fields: Mapping[str, Value]) -> Iterator[str]:
    for key, value in fields.items():
        old = gguf.metadata.get(key)
        was = "was missing" if old is None else f"was {_short(old.data)}"
        yield f"{key} {was}, is {_short(value.data)}."


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"


def _kept(gguf: GgufFile, path: Path, replaced: set[str]) -> Iterator[PlannedTensor]:
    for tensor in gguf.tensors.values():
        if tensor.gguf_name not in replaced:
            output = OutputTensor(tensor.gguf_name, tensor.type, tensor.shape, tensor.nbytes)
            yield PlannedTensor(output, Stored(path, tensor))


def _lay_out(gguf: GgufFile, fields: Mapping[str, Value], file_name: str, tensors: list[PlannedTensor]) -> GgufLayout:
    """The fields byte for byte as they were, but for those that change (in their places) and those that are new."""
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
