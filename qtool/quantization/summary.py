"""What a quantization does or did, in the few lines that a person wants.

Rule: the numbers of a dry run are computed by the same code as those of the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from qtool.checkpoint.workers import WORKERS
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.quantization.job import Job
from qtool.quantization.plan import Action, PlannedTensor, QuantizationPlan

SCHEMA_VERSION: Final = 1

_STREAMING_BASE: Final = 180 << 20  # Python, numpy, numba: 201 MB were measured with two threads, whatever the size
_STREAMING_PER_THREAD: Final = 6 << 20  # a piece, its codes and scales
_MODELOPT_BASE: Final = 1 << 30  # Python, torch, transformers, ModelOpt
_MODELOPT_FACTOR: Final = 1.2


@dataclass(frozen=True)
class TensorClass:
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
class QuantizationSummary:
    """`output_bytes` counts every file but qtool.json, and is the disk needed; `peak_memory_bytes` is an estimate."""

    architecture: str
    task: str
    task_source: str
    recipe: str
    backend: str
    backend_reason: str
    classes: tuple[TensorClass, ...]
    bits_per_weight: float
    source_bytes: int
    output_bytes: int
    peak_memory_bytes: int

    def to_json(self) -> Mapping[str, Any]:
        """The summary as `--json` prints it."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def tensor_classes(plan: QuantizationPlan, errors: Mapping[str, float]) -> tuple[TensorClass, ...]:
    """The plan's tensors by action and rule, in order of first appearance."""
    classes: dict[tuple[Action, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        classes.setdefault((tensor.action, tensor.rule), []).append(tensor)
    return tuple(_tensor_class(plan, members, errors) for members in classes.values())


def _tensor_class(plan: QuantizationPlan, members: list[PlannedTensor], errors: Mapping[str, float]) -> TensorClass:
    return TensorClass(
        rule=members[0].rule,
        action=members[0].action.value,
        reason=members[0].reason,
        tensors=len(members),
        weights=sum(member.elements for member in members),
        source_bytes=sum(member.source.nbytes for member in members),
        output_bytes=sum(o.nbytes for member in members for o in member.outputs(plan.recipe.block_size)),
        relative_error=max((errors[m.spec.hf_name] for m in members if m.spec.hf_name in errors), default=None),
    )


def summarize(job: Job, errors: Mapping[str, float] | None = None, written: Path | None = None) -> QuantizationSummary:
    """The summary of a job; after the run with the relative errors and the folder that was written."""
    source_bytes = sum(tensor.source.nbytes for tensor in job.plan.tensors)
    return QuantizationSummary(
        architecture=job.plan.detection.architecture.name,
        task=job.plan.detection.task.value if job.plan.detection.task else "unknown",
        task_source=job.plan.detection.task_source,
        recipe=job.plan.recipe.name,
        backend=job.backend,
        backend_reason=job.backend_reason,
        classes=tensor_classes(job.plan, errors or {}),
        bits_per_weight=job.plan.bits_per_weight,
        source_bytes=source_bytes,
        output_bytes=_size(written) if written else job.output_bytes,
        peak_memory_bytes=_peak_memory(job, source_bytes),
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _peak_memory(job: Job, source_bytes: int) -> int:
    """An estimate from measured runs: constant for streaming, in proportion to the model for ModelOpt."""
    if job.backend == "modelopt":
        return int(_MODELOPT_BASE + _MODELOPT_FACTOR * source_bytes)
    return _STREAMING_BASE + WORKERS * _STREAMING_PER_THREAD
