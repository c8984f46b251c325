"""`repair_gguf`: gives a GGUF file what it lacks to rank, without the base weights.

Rule: what is repaired is rebuilt from the file itself or from the family's published data; every other byte stays.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf.constants import PoolingType

from qtool.arch.prompts import reranker_prompt
from qtool.arch.spec import Task
from qtool.checkpoint.writer import check_target_file, manifest_of, require_space, staged_files
from qtool.convert.engine import write_tensors
from qtool.convert.metadata import task_metadata
from qtool.convert.names import RANK_HEAD
from qtool.convert.plan import PlannedTensor
from qtool.convert.repair_head import repaired_head
from qtool.convert.stored import Stored
from qtool.convert.templates import NAMES_KEY, RERANK_KEY, baked_instruction, rank_prompt
from qtool.errors import ModelError, UsageError
from qtool.gguf_file.layout import GgufLayout, OutputTensor, lay_out_encoded
from qtool.gguf_file.reader import GgufFile, read_gguf
from qtool.gguf_file.values import Kind, Value, array, encode_string, encode_value, string
from qtool.jsonfile import json_bytes
from qtool.manifest import manifest, versions
from qtool.progress import Meter, Progress, no_progress

FAMILIES: Final[Mapping[str, bool]] = {"qwen3": False, "qwen3vl": True}
"""Known architectures, and whether each sees pictures."""

_SCHEMES: Final = ("hf:", "https:", "http:")
_SHORTEST_ADDRESS: Final = 4  # hf://ORG/NAME/FILE


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
    """Fields to set, the rank head to write (None where its own stays), and why."""

    fields: Mapping[str, Value]
    head: PlannedTensor | None
    changes: tuple[str, ...]


def repair_gguf(options: RepairOptions, progress: Progress = no_progress) -> RepairSummary:
    """Write `options.fixed`: the file `options.broken` with all that its task needs."""
    _require_file(options.broken)
    check_target_file(options.fixed, force=options.force)
    gguf = read_gguf(options.broken)
    repair = _plan(gguf, options)
    if not repair.changes:
        raise UsageError(f"{options.broken} lacks nothing that it needs to {_task(gguf, options).value}.")
    tensors = list(_tensors(gguf, options.broken, repair.head))
    layout = _lay_out(gguf, repair.fields, options.fixed.name, tensors)
    require_space(options.fixed, layout.nbytes)
    with staged_files(options.fixed, force=options.force) as folder:
        meter = Meter(sum(tensor.source.work_bytes for tensor in tensors), progress)
        hashes = write_tensors([layout], tensors, folder, meter.advance)
        (folder / manifest_of(options.fixed).name).write_bytes(json_bytes(_manifest(repair, hashes)))
    return RepairSummary(repair.changes, layout.nbytes)


def _require_file(path: Path) -> None:
    """Raise UsageError unless `path` is a file on this disk: its weights are copied, so that none is repaired from afar."""
    if path.is_file():
        return
    if path.is_dir():
        names = sorted(each.name for each in path.glob("*.gguf"))
        raise UsageError(
            f"{path} is a folder.", f"Name one file, such as {path / (names[0] if names else 'FILE.gguf')}."
        )
    if path.parts[:1] and path.parts[0] in _SCHEMES:
        raise UsageError(
            "repair-gguf takes a file on this disk, and no address.", f"Download it first: {_download(path)}"
        )
    if not path.exists():
        raise UsageError(
            f"There is no file {path}.", "Pass a GGUF file on this disk; hf download ORG/NAME FILE fetches one."
        )


def _download(path: Path) -> str:
    """The command that fetches what an address names; a path has lost one of its slashes."""
    if path.parts[0] != _SCHEMES[0] or len(path.parts) < _SHORTEST_ADDRESS:
        return "hf download ORG/NAME FILE.gguf --local-dir ."
    repo, _, revision = "/".join(path.parts[1:3]).partition("@")
    at = ["--revision", revision] if revision else []
    return shlex.join(["hf", "download", repo, "/".join(path.parts[3:]), *at, "--local-dir", "."])


def _plan(gguf: GgufFile, options: RepairOptions) -> _Repair:
    architecture = gguf.get("general.architecture")
    if architecture not in FAMILIES:
        raise ModelError(f"{gguf.name} is a {architecture!r} model; qtool repairs {' and '.join(FAMILIES)} rankers.")
    if gguf.get("split.count", 1) > 1:
        raise ModelError(f"{gguf.name} is one part of several.", "Put them together: llama-gguf-split --merge.")
    task = _task(gguf, options)
    if task is Task.EMBED and options.base is not None:
        raise UsageError("--base gives a rank head, and an embedder has none.", "Leave --base out, or --task embed.")
    wanted = dict(task_metadata(architecture, task))
    head = None
    if task is Task.RERANK:
        head = repaired_head(gguf, options.broken, options.base)
        wanted |= _template_fields(gguf, options)
    changed = {key: value for key, value in wanted.items() if gguf.metadata.get(key) != value}
    changes = (*((head.change,) if head else ()), *_field_changes(gguf, changed))
    return _Repair(changed, head.tensor if head else None, changes)


def _task(gguf: GgufFile, options: RepairOptions) -> Task:
    """What the file is to do: as asked, else as its pooling says, else to rank."""
    if options.task is not None:
        return options.task
    pooling = gguf.get(f"{gguf.get('general.architecture')}.pooling_type")
    return Task.EMBED if pooling == PoolingType.LAST and RANK_HEAD not in gguf.tensors else Task.RERANK


def _template_fields(gguf: GgufFile, options: RepairOptions) -> dict[str, Value]:
    official = reranker_prompt(is_vision=FAMILIES[gguf.get("general.architecture")])
    names = sorted({*gguf.get(NAMES_KEY, []), "rerank"})
    instruction = options.instruction or baked_instruction(gguf.get(RERANK_KEY, ""), official)
    template = rank_prompt(official, "official", instruction)
    return {RERANK_KEY: string(template), NAMES_KEY: array(Kind.STRING, names)}


def _field_changes(gguf: GgufFile, fields: Mapping[str, Value]) -> Iterator[str]:
    for key, value in fields.items():
        old = gguf.metadata.get(key)
        was = "was missing" if old is None else f"was {_short(old.data)}"
        yield f"{key} {was}, is {_short(value.data)}."


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"


def _tensors(gguf: GgufFile, path: Path, head: PlannedTensor | None) -> Iterator[PlannedTensor]:
    """All tensors as they were, but for the head: in its place, or before all others where there was none."""
    if head is not None and RANK_HEAD not in gguf.tensors:
        yield head
    for tensor in gguf.tensors.values():
        if head is not None and tensor.gguf_name == RANK_HEAD:
            yield head
            continue
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
