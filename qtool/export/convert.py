"""`convert_gguf`: plan a conversion, check it, write the files and summarise them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from qtool.arch.detect import Detection
from qtool.arch.families import SEEN_IN
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.console import human_size, verify_next
from qtool.errors import ModelError, UsageError
from qtool.export.gguf_files import (
    INTERMEDIATE,
    MODEL,
    Namer,
    PlannedFile,
    language_files,
    projector_file,
    write_planned_files,
)
from qtool.export.gguf_metadata import rank_prompt
from qtool.export.gguf_plan import (
    LLAMA_QUANTIZE_TYPES,
    NO_PROJECTOR,
    ConvertOptions,
    Inventory,
    require_rankable,
    take_inventory,
)
from qtool.export.imatrix import LAYER, ImportanceMatrix, check_imatrix
from qtool.export.llama_quantize import Quantizer, find_quantizer
from qtool.export.sources import Repacked
from qtool.export.tensor_types import TensorType, check_tensor_types, parse_tensor_types
from qtool.formats.ggml import NVFP4
from qtool.jsonfile import json_bytes, read_json
from qtool.manifest import FILE_NAME, manifest, versions
from qtool.progress import Meter, Progress, ignore
from qtool.results import Result
from qtool.storage.atomic import (
    check_target,
    check_target_file,
    manifest_of,
    require_space,
    staged_files,
    staged_folder,
)
from qtool.storage.hashing import sha256_of
from qtool.storage.hub import Source, resolve_for_export
from qtool.storage.hub_weights import WINDOW_BYTES

# Planning: only configs, headers and the tokenizer are read.


@dataclass(frozen=True)
class ConvertJob:
    """A planned conversion; `quantized` maps the types that llama.cpp writes to their files."""

    source: Source
    inventory: Inventory
    task: Task
    rank_template: str | None
    files: tuple[PlannedFile, ...]
    quantized: Mapping[str, str]
    imatrix: ImportanceMatrix | None = None
    tensor_types: tuple[TensorType, ...] = ()


def prepare_conversion(options: ConvertOptions) -> ConvertJob:
    """Resolve and open the model, and plan its files. Raises QtoolError."""
    options.check()
    source = resolve_for_export(
        options.model,
        options.revision,
        options.token,
        stream=options.stream,
        dry_run=options.dry_run or options.output is None,
        output=options.output,
    )
    with source.named_errors():
        return plan_conversion(options, CheckpointArtefact(source, options.task))


def plan_conversion(options: ConvertOptions, opened: CheckpointArtefact) -> ConvertJob:
    """Plan and lay out the conversion of a checkpoint that has been opened."""
    source, detection = opened.source, opened.detection
    task = detection.require_task()
    require_rankable(detection)
    inventory = take_inventory(opened.checkpoint, detection)
    namer = Namer(options.output, source)
    template = _rank_template(options, detection, task)
    files = list(language_files(options, opened, inventory, task, template, namer))
    if detection.architecture.is_vision and options.mmproj != NO_PROJECTOR:
        files.append(projector_file(options.mmproj, source, inventory, namer))
    quantized = {name: namer.language(name.upper()) for name in options.outtypes if name in LLAMA_QUANTIZE_TYPES}
    imatrix = check_imatrix(options.imatrix, _weighed(files)) if options.imatrix else None
    job = ConvertJob(source, inventory, task, template, tuple(files), quantized, imatrix)
    return replace(job, tensor_types=_tensor_types(options, files))


def _tensor_types(options: ConvertOptions, files: Sequence[PlannedFile]) -> tuple[TensorType, ...]:
    if not options.tensor_types and options.tensor_type_file is None:
        return ()
    types = parse_tensor_types(options.tensor_types, options.tensor_type_file)
    check_tensor_types(types, _weighed(files))
    return types


def _weighed(files: Sequence[PlannedFile]) -> Mapping[str, tuple[int, ...]]:
    """The matrices, by name, that an importance matrix must know, and that types can be chosen for: those of the layers."""
    (model,) = (file for file in files if file.role == INTERMEDIATE)
    outputs = [tensor.output for tensor in model.tensors if tensor.output.gguf_name.startswith(LAYER)]
    return {output.gguf_name: output.shape for output in outputs if len(output.shape) > 1}


def _rank_template(options: ConvertOptions, detection: Detection, task: Task) -> str | None:
    if task is Task.RERANK:
        return rank_prompt(detection.family.reranker, options.prompt, options.instruction)
    if options.instruction is not None:
        raise UsageError(
            "--instruction applies to rerankers; an embedder gets its instruction with each request.",
            "Remove --instruction.",
        )
    return None


# The summary. The sizes of a dry run are exact; those of files that llama.cpp writes are known only afterwards.

SCHEMA_VERSION: Final = 1

_SCALES_DROPPED: Final = (
    "llama.cpp (last seen in {build}) ignores the NVFP4 scales of the feed-forward matrices of {architecture}, so that "
    "this file gives wrong scores there. Verify it with the llama.cpp that will serve it, or serve Q8_0."
)


@dataclass(frozen=True)
class FileSummary:
    """One file; `nbytes` and `bits_per_weight` are None where llama.cpp decides them."""

    name: str
    role: str
    type: str
    tensors: int | None
    nbytes: int | None
    bits_per_weight: float | None


@dataclass(frozen=True, repr=False)
class ConversionSummary(Result):
    """All files, and the prompt template in those of a reranker."""

    architecture: str
    task: str
    task_source: str
    files: tuple[FileSummary, ...]
    rank_template: str | None
    warnings: tuple[str, ...]
    streamed: bool = False

    @property
    @override
    def headline(self) -> str:
        return f"{self.architecture}, task {self.task}: {', '.join(file.name for file in self.files)}."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [asdict(file) for file in self.files]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def summarize_conversion(job: ConvertJob, made: Mapping[str, int] | None = None) -> ConversionSummary:
    """The summary of a job; `made` are the sizes of the files that llama.cpp wrote."""
    own = [
        _summary(file, number) for file in job.files if file.role != INTERMEDIATE for number in range(len(file.layouts))
    ]
    theirs = [
        FileSummary(name, "model", type_name.upper(), None, (made or {}).get(name), None)
        for type_name, name in job.quantized.items()
    ]
    detection = job.inventory.detection
    files = (*own, *theirs)
    return ConversionSummary(
        detection.architecture.name,
        job.task.value,
        detection.task_source,
        files,
        job.rank_template,
        _warnings(job),
        job.source.remote is not None,
    )


def _warnings(job: ConvertJob) -> tuple[str, ...]:
    is_nvfp4 = any(file.type.matrices is NVFP4 for file in job.files)
    family = job.inventory.detection.family
    if not is_nvfp4 or family.ignored_scales is None:
        return ()
    return (_SCALES_DROPPED.format(build=SEEN_IN, architecture=family.gguf_architecture),)


def _summary(file: PlannedFile, number: int) -> FileSummary:
    layout = file.layouts[number]
    return FileSummary(
        layout.file_name, file.role, file.type.label, len(layout.ranges), layout.nbytes, file.bits_per_weight
    )


def conversion_table(summary: ConversionSummary, model: str, output: Path | None, *, dry_run: bool) -> RenderableType:
    """One row per file, the rank head's prompt, and what to do next with what `model` became."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("type", no_wrap=True)
    for heading in ("tensors", "size", "bits/weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file in summary.files:
        table.add_row(file.name, file.type, *_numbers(file))
    lines = [f"{summary.architecture}, task {summary.task} ({summary.task_source})"]
    if summary.streamed:
        lines.append("weights read from the Hub by range, not stored")
    if summary.rank_template is not None:
        lines.append(f"rank head: yes and no rows; prompt in the file: {summary.rank_template!r}")
    lines += [f"WARNING: {warning}" for warning in summary.warnings]
    return Group(table, Text(""), *map(Text, lines), _closing(summary, model, output, dry_run=dry_run))


def _closing(summary: ConversionSummary, model: str, output: Path | None, *, dry_run: bool) -> Text:
    if dry_run or output is None:
        return Text("Dry run: nothing was written.")
    languages = [file for file in summary.files if file.role == MODEL]
    if output.is_dir():  # of several language models the first is named: a command verifies one
        is_one = len({file.type for file in languages}) == 1
        return verify_next(output, output if is_one else output / languages[0].name, model)
    # A file that was split into parts does not exist under its own name.
    made = output if output.exists() else output.with_name(summary.files[0].name)
    return verify_next(made, made, model)


def _numbers(file: FileSummary) -> tuple[str, str, str]:
    return (
        "" if file.tensors is None else f"{file.tensors:,}",
        "by llama.cpp" if file.nbytes is None else human_size(file.nbytes),
        "" if file.bits_per_weight is None else f"{file.bits_per_weight:.2f}",
    )


# Writing: everything that can be refused is refused before the first byte is written.


def convert_gguf(options: ConvertOptions, progress: Progress = ignore) -> ConversionSummary:
    """Convert `options.model` to GGUF files in `options.output`; with `dry_run` only plan them."""
    output = options.output
    if output is not None and not options.dry_run:
        (check_target_file if options.is_file else check_target)(output, force=options.force)
    job = prepare_conversion(options)
    if options.dry_run or output is None:
        return replace(summarize_conversion(job), streamed=bool(options.stream))
    quantizer = find_quantizer() if job.quantized else None
    require_space(output, sum(file.nbytes for file in job.files) + (WINDOW_BYTES if job.source.remote else 0))
    with _staged(output, options) as folder:
        sizes = _write(job, options, quantizer, folder, progress)
    return summarize_conversion(job, sizes)


def _staged(output: Path, options: ConvertOptions) -> AbstractContextManager[Path]:
    return (staged_files if options.is_file else staged_folder)(output, force=options.force)


def _write(
    job: ConvertJob, options: ConvertOptions, quantizer: Quantizer | None, folder: Path, progress: Progress
) -> Mapping[str, int]:
    """Write everything into `folder`; returns the size of each file that llama.cpp wrote."""
    source_bytes = sum(file.nbytes for file in job.files if file.role == INTERMEDIATE)
    work = sum(file.work_bytes for file in job.files) + source_bytes * len(job.quantized)
    meter = Meter(work, progress)
    hashes = write_planned_files(job.inventory.checkpoint, job.files, folder, meter.advance)
    made = _quantize(job, options, quantizer, folder, meter) if quantizer else {}
    kept = [_file_facts(file, own) for file, own in zip(job.files, hashes, strict=True) if file.role != INTERMEDIATE]
    manifest_name = manifest_of(options.output).name if options.is_file and options.output else FILE_NAME
    (folder / manifest_name).write_bytes(json_bytes(_manifest(job, options, kept, made)))
    return {name: (folder / name).stat().st_size for name in made}


def _quantize(
    job: ConvertJob, options: ConvertOptions, quantizer: Quantizer, folder: Path, meter: Meter
) -> Mapping[str, str]:
    """Let llama.cpp write its types from the lossless file, and delete that; returns the SHA-256 of each by name."""
    (source,) = (folder / file.layouts[0].file_name for file in job.files if file.role == INTERMEDIATE)
    for type_name, file_name in job.quantized.items():
        share = meter.portion(source.stat().st_size)
        quantizer.quantize(source, folder / file_name, type_name, options.imatrix, share, job.tensor_types)
    source.unlink()
    names = list(job.quantized.values())
    return dict(zip(names, sha256_of([folder / name for name in names]), strict=True))


def _file_facts(file: PlannedFile, hashes: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "names": [layout.file_name for layout in file.layouts],
        "role": file.role,
        "type": file.type.label,
        "nbytes": file.nbytes,
        "sha256": dict(hashes),
    }


def _manifest(
    job: ConvertJob, options: ConvertOptions, files: list[Mapping[str, Any]], quantized: Mapping[str, str]
) -> Mapping[str, Any]:
    detection = job.inventory.detection
    return manifest(
        "convert-gguf",
        versions=versions("numpy", "numba", "gguf"),
        source={"origin": job.source.origin, "revision": job.source.revision},
        architecture=detection.architecture.name,
        task={"value": job.task.value, "declared_by": detection.task_source},
        prompt={"kind": options.prompt, "template": job.rank_template} if job.rank_template else None,
        files=files,
        quantized_by_llama_cpp=[{"name": name, "sha256": digest} for name, digest in quantized.items()],
        **({"tensor_types": [each.argument for each in job.tensor_types]} if job.tensor_types else {}),
        **(_calibration(job.imatrix, options.imatrix) or _origin(job)),
    )


_KEPT: Final = ("recipe", "calibration", "run")
"""What the manifest of a quantized checkpoint says of how its weights were made, which repacking them does not change."""


def _origin(job: ConvertJob) -> Mapping[str, Any]:
    """Where packed weights were made by `qtool quantize`: by which recipe, on which data, and what is recorded of each."""
    made: Mapping[str, Any] = {}
    if job.inventory.packed:
        with suppress(ModelError):  # no manifest, or one that cannot be read: nothing is known
            made = read_json(job.inventory.checkpoint.directory / FILE_NAME)
    tensors = made.get("tensors")
    known = {each.get("name"): each for each in tensors if isinstance(each, dict)} if isinstance(tensors, list) else {}
    gguf_names = {
        tensor.source.weight.packed.hf_name: tensor.output.gguf_name
        for file in job.files
        for tensor in file.tensors
        if isinstance(tensor.source, Repacked)
    }
    canonical = {info.hf_name: spec.hf_name for spec, info in job.inventory.tensors.items()}
    entries = [
        {"gguf_name": gguf_name, **known[canonical[hf_name]]}
        for hf_name, gguf_name in gguf_names.items()
        if "checksums" in known.get(canonical.get(hf_name), {})
    ]
    return {**{key: made[key] for key in _KEPT if key in made}, **({"tensors": entries} if entries else {})}


def _calibration(imatrix: ImportanceMatrix | None, path: Path | None) -> Mapping[str, Any]:
    """The importance matrix by name and hash, and what `qtool calibrate` says of its data."""
    if imatrix is None or path is None:
        return {}
    origin = {key.rpartition(".")[2]: fact for key, fact in imatrix.origin.items() if not key.endswith(".file")}
    (digest,) = sha256_of([path])
    facts = {"calibration": dict(imatrix.facts)} if imatrix.facts else {}
    return {"imatrix": {"name": path.name, "sha256": digest, **origin}, **facts}
