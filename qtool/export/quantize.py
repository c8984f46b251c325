"""`quantize`: plan, check, carry out, describe."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from qtool.arch.detect import Detection
from qtool.arch.prompts import FILE_NAME as RERANK_TEMPLATE
from qtool.arch.prompts import rerank_template
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.console import human_size, verify_next
from qtool.errors import UsageError
from qtool.export.nvfp4 import Rounding
from qtool.export.quantize_plan import (
    Action,
    PlannedTensor,
    QuantizationPlan,
    hf_quant_config,
    plan_quantization,
    quantized_config,
)
from qtool.extras import require_extra
from qtool.inputs.builtin import is_dataset
from qtool.jsonfile import json_bytes
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.manifest import manifest, versions
from qtool.options import Memory, Options
from qtool.progress import Meter, Progress, ignore
from qtool.recipe import LoadedRecipe, load_recipe
from qtool.resources import DEFAULT_RECIPE
from qtool.results import Result
from qtool.storage.atomic import check_target, require_space, staged_folder
from qtool.storage.checkpoint import INDEX, Checkpoint, find_sidecars
from qtool.storage.hashing import sha256_of
from qtool.storage.hub import Source, resolve_for_export
from qtool.storage.hub_weights import WINDOW_BYTES, weights_ahead
from qtool.storage.shards import ShardLayout, lay_out
from qtool.workers import WORKERS

# Options, and the job that is made of them from configs and headers alone.


Backend = Literal["auto", "streaming", "modelopt"]
Effort = Literal["fast", "standard", "best"]
BACKENDS: Final[tuple[Backend, ...]] = ("auto", "streaming", "modelopt")
DEFAULT_MAX_SHARD_BYTES: Final = 1 << 29
"""Shards are downloaded and hashed in parallel: several of half a gigabyte are faster than one of five."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Options):
    """The options of `qtool quantize`; `model` is a folder, a Hub repository or a demo model.

    With `stream` a repository's weights are read by range and never stored; None does so where the disk is too short.
    `data` (calibration sets, panels or data sets, of each the first `limit` queries), `effort`, `memory` and `device` are
    for a recipe that fits weights to data: by default the sets that fit the model, what the recipe says, what is free, and
    a GPU where there is one.
    """

    model: str
    output: Path | None = None
    recipe: str = DEFAULT_RECIPE
    backend: Backend = "auto"
    task: Task | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    stream: bool | None = None
    force: bool = False
    dry_run: bool = False
    data: tuple[str, ...] = ()
    limit: int | None = None
    effort: Effort | None = None
    memory: Memory = "auto"
    device: str = "auto"

    @property
    def writes_nothing(self) -> bool:
        """Whether only the plan is wanted."""
        return self.dry_run or self.output is None


@dataclass(frozen=True)
class QuantizeJob:
    """Everything known before the first weight is read."""

    source: Source
    checkpoint: Checkpoint
    recipe: LoadedRecipe
    plan: QuantizationPlan
    layout: ShardLayout
    backend: Literal["streaming", "modelopt"]
    backend_reason: str
    small_files: Mapping[str, bytes]

    @property
    def sidecars(self) -> list[Path]:
        """Side files of the source, relative to it."""
        return find_sidecars(self.checkpoint.directory)

    @property
    def output_bytes(self) -> int:
        """Bytes of the output folder, qtool.json excepted."""
        sidecar_bytes = sum((self.checkpoint.directory / path).stat().st_size for path in self.sidecars)
        return self.layout.nbytes + sum(map(len, self.small_files.values())) + sidecar_bytes


def prepare_quantization(options: QuantizeOptions) -> QuantizeJob:
    """Resolve, open and plan."""
    if options.output is not None and not options.dry_run:
        check_target(options.output, force=options.force)
    recipe = load_recipe(options.recipe)
    _refuse_data(options, recipe)
    backend, reason = _choose(options.backend, recipe)
    source = resolve_for_export(
        options.model,
        options.revision,
        options.token,
        stream=_may_stream(options, backend),
        dry_run=options.writes_nothing,
        output=options.output,
    )
    opened = CheckpointArtefact(source, options.task)
    with source.named_errors():
        plan = plan_quantization(opened.checkpoint, opened.detection, recipe.recipe)
    layout = lay_out(plan.outputs, options.max_shard_bytes)
    return QuantizeJob(
        source=source,
        checkpoint=opened.checkpoint,
        recipe=recipe,
        plan=plan,
        layout=layout,
        backend=backend,
        backend_reason=reason,
        small_files=_small_files(plan, layout),
    )


def _refuse_data(options: QuantizeOptions, recipe: LoadedRecipe) -> None:
    if recipe.recipe.calibration is None:
        from_hub = any(is_dataset(name) for name in options.data)
        data = {"dataset" if from_hub else "data": options.data}
        device = options.device != "auto"
        for name, given in {**data, "effort": options.effort, "limit": options.limit, "device": device}.items():
            if given:
                raise UsageError(
                    f"Recipe {recipe.recipe.name} uses no data; --{name} applies to calibrated recipes only.",
                    "Pass --recipe nvfp4-w4a16-calibrated, or leave the option out.",
                )


def _choose(backend: Backend, recipe: LoadedRecipe) -> tuple[Literal["streaming", "modelopt"], str]:
    if recipe.recipe.calibration is not None:
        if backend == "modelopt":
            raise UsageError(
                f"ModelOpt does not know the algorithm of recipe {recipe.recipe.name}.", "Leave out --backend."
            )
        return "streaming", "the recipe's algorithm is qtool's own"
    if backend == "auto":  # every other algorithm that the recipe schema admits is one that streaming carries out
        return "streaming", "auto: the recipe's algorithm needs no model in memory"
    if backend == "modelopt":
        require_extra("modelopt", "--backend modelopt", "use --backend streaming, which writes the same bytes")
    return backend, "--backend"


def _may_stream(options: QuantizeOptions, backend: str) -> bool | None:
    """What `stream` comes to: ModelOpt loads the model from a folder."""
    if backend == "streaming":
        return options.stream
    if options.stream:
        raise UsageError("--stream applies to --backend streaming only.", "Leave out --stream or --backend modelopt.")
    return False


def _small_files(plan: QuantizationPlan, layout: ShardLayout) -> Mapping[str, bytes]:
    return {
        "config.json": json_bytes(quantized_config(plan)),
        "hf_quant_config.json": json_bytes(hf_quant_config(plan)),
        **({INDEX: layout.index} if layout.index else {}),
        **_rerank_template(plan.detection),
    }


def _rerank_template(detection: Detection) -> Mapping[str, bytes]:
    """What vLLM needs as --chat-template; not for a `score` head, which may have been trained on another prompt."""
    if detection.task is not Task.RERANK or detection.architecture.head != "lm_head":
        return {}
    return {RERANK_TEMPLATE: rerank_template(detection.family.reranker).encode()}


# The summary of a quantization; a dry run computes its numbers by the same code as the real one.


SCHEMA_VERSION: Final = 1

_STREAMING_BASE: Final = 180 << 20  # Python, numpy, numba: 188 MB were measured with two threads, whatever the size
_STREAMING_PER_THREAD: Final = 6 << 20  # a chunk, its codes and scales
_FETCHING: Final = 40 << 20  # the connections to the hub and what they have just received
_MODELOPT_BASE: Final = 1 << 30  # Python, torch, transformers, ModelOpt
_MODELOPT_FACTOR: Final = 1.2


@dataclass(frozen=True)
class SummaryRow:
    """All tensors that one rule claims. `relative_error` is the largest among them, None before the run."""

    rule: str
    action: str
    reason: str
    tensors: int
    weights: int
    source_bytes: int
    output_bytes: int
    relative_error: float | None


@dataclass(frozen=True)
class CalibrationSummary:
    """How weights are fitted to data: of a dry run, what it would take; afterwards, what it took and what came of it.

    `tokens` are distinct ones of `data`. `output_error` is the RMS of what the rounding of a linear changes in its output
    on the data, over the output's RMS, and `max_output_error` that of plain `max` rounding (both roots of the means of
    squares over all linears). `memory` and `disk` (beside the artefact, until it is written) are estimates in bytes.
    """

    effort: str
    data: str
    tokens: int
    seconds: float
    warnings: tuple[str, ...] = ()
    memory: int | None = None
    disk: int | None = None
    output_error: float | None = None
    max_output_error: float | None = None


@dataclass(frozen=True, repr=False)
class QuantizationSummary(Result):
    """`output_bytes` counts every file but qtool.json, and is the disk needed; `peak_memory_bytes` is an estimate."""

    architecture: str
    task: str
    task_source: str
    recipe: str
    backend: str
    backend_reason: str
    classes: tuple[SummaryRow, ...]
    bits_per_weight: float
    source_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    streamed: bool = False
    calibration: CalibrationSummary | None = None

    @property
    @override
    def headline(self) -> str:
        return (
            f"{self.architecture}, task {self.task}: {human_size(self.source_bytes)} of weights became "
            f"{human_size(self.output_bytes)}, {self.bits_per_weight:.2f} bits per weight."
        )

    @override
    def records(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.classes]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def summary_rows(plan: QuantizationPlan, errors: Mapping[str, float]) -> tuple[SummaryRow, ...]:
    """The plan's tensors by action and rule, in order of first appearance."""
    classes: dict[tuple[Action, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        classes.setdefault((tensor.action, tensor.rule), []).append(tensor)
    return tuple(_tensor_class(plan, members, errors) for members in classes.values())


def _tensor_class(plan: QuantizationPlan, members: list[PlannedTensor], errors: Mapping[str, float]) -> SummaryRow:
    return SummaryRow(
        rule=members[0].rule,
        action=members[0].action.value,
        reason=members[0].reason,
        tensors=len(members),
        weights=sum(member.elements for member in members),
        source_bytes=sum(member.source.nbytes for member in members),
        output_bytes=sum(o.nbytes for member in members for o in member.outputs(plan.recipe.block_size)),
        relative_error=max((errors[m.spec.hf_name] for m in members if m.spec.hf_name in errors), default=None),
    )


def summarize_quantization(
    job: QuantizeJob, errors: Mapping[str, float] | None = None, written: Path | None = None
) -> QuantizationSummary:
    """The summary of a job; after the run with the relative errors and the folder that was written."""
    source_bytes = sum(tensor.source.nbytes for tensor in job.plan.tensors)
    return QuantizationSummary(
        architecture=job.plan.detection.architecture.name,
        task=job.plan.detection.task.value if job.plan.detection.task else "unknown",
        task_source=job.plan.detection.task_source,
        recipe=job.plan.recipe.name,
        backend=job.backend,
        backend_reason=job.backend_reason,
        classes=summary_rows(job.plan, errors or {}),
        bits_per_weight=job.plan.bits_per_weight,
        source_bytes=source_bytes,
        output_bytes=_size(written) if written else job.output_bytes,
        peak_memory_bytes=_peak_memory(job, source_bytes),
        streamed=job.source.remote is not None,
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _peak_memory(job: QuantizeJob, source_bytes: int) -> int:
    """An estimate from measured runs: constant for streaming, in proportion to the model for ModelOpt."""
    if job.backend == "modelopt":
        return int(_MODELOPT_BASE + _MODELOPT_FACTOR * source_bytes)
    return _STREAMING_BASE + WORKERS * _STREAMING_PER_THREAD + (_FETCHING if job.source.remote else 0)


# The summary as a table.


_BECOMES: Final = {"quantize": "NVFP4", "copy": "unchanged", "drop": "left out"}


def quantization_table(
    summary: QuantizationSummary, model: str, output: Path | None, *, dry_run: bool
) -> RenderableType:
    """One row a rule, why some tensors stay as they are, the totals, and what to do next with what `model` became."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("modules", overflow="fold", max_width=36)
    table.add_column("becomes", no_wrap=True)
    for heading in ("tensors", "from", "to", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in summary.classes:
        table.add_row(*map(Text, _row(each)))
    reasons = [Text(f"{each.rule}: {each.reason}") for each in summary.classes if each.action != "quantize"]
    blank = Text("")
    fitted = [Text(line) for line in _calibrated(summary.calibration)] if summary.calibration else []
    closing = _closing(model, output, dry_run=dry_run)
    return Group(table, blank, *reasons, blank, Text(_totals(summary)), *fitted, closing)


def _row(each: SummaryRow) -> tuple[str, ...]:
    error = "" if each.relative_error is None else f"{each.relative_error:.2%}"
    return (
        each.rule,
        _BECOMES[each.action],
        f"{each.tensors:,}",
        human_size(each.source_bytes),
        human_size(each.output_bytes),
        error,
    )


def _totals(summary: QuantizationSummary) -> str:
    ratio = summary.output_bytes / summary.source_bytes
    streamed = "weights read from the Hub by range, not stored\n" if summary.streamed else ""
    return (
        f"{summary.architecture}, task {summary.task} ({summary.task_source})\n{streamed}"
        f"recipe {summary.recipe}, backend {summary.backend} ({summary.backend_reason})\n"
        f"{human_size(summary.source_bytes)} of weights -> {summary.output_bytes:,} bytes on disk ({ratio:.0%}), "
        f"{summary.bits_per_weight:.2f} bits per weight, about {human_size(summary.peak_memory_bytes)} of memory"
    )


def _calibrated(done: CalibrationSummary) -> Iterator[str]:
    space = ""
    if done.memory is not None and done.disk is not None:
        space = f", {human_size(done.memory)} of memory and {human_size(done.disk)} of disk until it is done"
    yield f"effort {done.effort}, {done.tokens:,} tokens of {done.data}, about {_duration(done.seconds)}{space}"
    if done.output_error is not None and done.max_output_error is not None:
        yield (
            f"the linears' outputs on the data change by {done.output_error:.2%} (RMS); "
            f"rounded without data they would by {done.max_output_error:.2%}"
        )
    yield from (f"WARNING: {warning}" for warning in done.warnings)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _closing(model: str, output: Path | None, *, dry_run: bool) -> Text:
    if dry_run or output is None:
        return Text("Dry run: nothing was written.")
    return verify_next(output, output, model)


# The pipeline. Everything that can be refused is refused before the first byte is written.


def quantize(options: QuantizeOptions, progress: Progress = ignore) -> QuantizationSummary:
    """Quantize `options.model` into the folder `options.output`; with `dry_run`, only plan it."""
    job = prepare_quantization(options)
    if options.dry_run or options.output is None:
        return replace(summarize_quantization(job), streamed=bool(options.stream))
    return write_artefact(job, options, options.output, progress)


def write_artefact(
    job: QuantizeJob, options: QuantizeOptions, output: Path, progress: Progress, rounding: Rounding | None = None
) -> QuantizationSummary:
    """Carry out a job; `rounding` has the weights of a recipe that fits them to data."""
    require_space(output, job.output_bytes + (WINDOW_BYTES if job.source.remote else 0))
    with staged_folder(output, force=options.force) as folder:
        errors = _write(job, options, folder, progress, rounding)
    return summarize_quantization(job, errors, output)


def _write(
    job: QuantizeJob, options: QuantizeOptions, folder: Path, progress: Progress, rounding: Rounding | None
) -> Mapping[str, float]:
    if job.backend == "streaming":
        hashes, errors = _write_streaming(job, folder, progress, rounding)
    else:
        hashes, errors = _write_modelopt(job, options, folder, progress)
    for relative in job.sidecars:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.checkpoint.directory / relative, folder / relative)
    others = sorted(_files(folder) - set(hashes))
    hashes = {**hashes, **dict(zip(others, sha256_of([folder / path for path in others]), strict=True))}
    (folder / MANIFEST).write_bytes(json_bytes(_manifest(job, hashes, errors, rounding)))
    return errors


def _write_streaming(
    job: QuantizeJob, folder: Path, progress: Progress, rounding: Rounding | None
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    with weights_ahead(job.checkpoint, folder) as expect:
        # Half a second for numba, in which the first weights arrive.
        from qtool.export.nvfp4 import quantization_sources, relative_errors
        from qtool.export.tensor_writer import reads_of, write_tensors

        sources = quantization_sources(job.checkpoint, job.plan, rounding)
        expect(reads_of(sources))
        meter = Meter(sum(source.work_bytes for source in sources), progress)
        hashes = write_tensors(job.layout.shards, sources, folder, meter.advance)
    for name, data in job.small_files.items():
        (folder / name).write_bytes(data)
    return hashes, relative_errors(sources) if rounding is None else rounding.relative_errors


def _write_modelopt(
    job: QuantizeJob, options: QuantizeOptions, folder: Path, progress: Progress
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    from qtool.export.modelopt import quantize_modelopt

    errors = quantize_modelopt(job.checkpoint, job.plan, folder, options.max_shard_bytes, progress)
    for name in set(job.small_files) - {INDEX}:  # ModelOpt cuts its own shards, so its index stays
        (folder / name).write_bytes(job.small_files[name])
    return {}, errors


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _manifest(
    job: QuantizeJob, hashes: Mapping[str, str], errors: Mapping[str, float], rounding: Rounding | None
) -> Mapping[str, Any]:
    detection = job.plan.detection
    return manifest(
        "quantize",
        backend=job.backend,
        versions=versions("nvidia-modelopt", "torch", "transformers")
        if job.backend == "modelopt"
        else versions("numpy", "numba"),
        source={
            "origin": job.source.origin,
            "revision": job.source.revision,
            "config_sha256": _config_hash(job.checkpoint),
        },
        architecture=detection.architecture.name,
        task={"value": detection.task.value if detection.task else "unknown", "declared_by": detection.task_source},
        recipe={"name": job.recipe.recipe.name, "sha256": job.recipe.sha256, "text": job.recipe.text},
        files=dict(sorted(hashes.items())),
        tensors=[_tensor_facts(tensor, errors, rounding) for tensor in job.plan.tensors],
        **(rounding.manifest if rounding is not None else {}),
    )


def _config_hash(checkpoint: Checkpoint) -> str:
    return hashlib.sha256((checkpoint.directory / "config.json").read_bytes()).hexdigest()


def _tensor_facts(tensor: PlannedTensor, errors: Mapping[str, float], rounding: Rounding | None) -> Mapping[str, Any]:
    facts: dict[str, Any] = {
        "name": tensor.spec.hf_name,
        "action": tensor.action.value,
        "rule": tensor.rule,
        "reason": tensor.reason,
        "shape": list(tensor.source.shape),
        "from": tensor.source.dtype,
    }
    if tensor.action is Action.QUANTIZE:
        facts |= {"to": "NVFP4", "relative_error": float(f"{errors[tensor.spec.hf_name]:.4g}")}
        facts |= rounding.tensor_facts(tensor.spec.hf_name) if rounding is not None else {}
    return facts
