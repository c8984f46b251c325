"""`quantize`: plan, check, carry out, describe. The whole pipeline in one readable function.

Rule: everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.hashing import sha256_of
from qtool.checkpoint.reader import INDEX, Checkpoint
from qtool.checkpoint.writer import require_space, staged_folder
from qtool.jsonfile import json_bytes
from qtool.manifest import FILE_NAME, manifest, versions
from qtool.progress import Meter, Progress, no_progress
from qtool.quantization.job import Job, QuantizeOptions, prepare
from qtool.quantization.plan import Action, PlannedTensor
from qtool.quantization.summary import QuantizationSummary, summarize


def quantize(options: QuantizeOptions, progress: Progress = no_progress) -> QuantizationSummary:
    """Quantize `options.model` into `options.output`, or with `dry_run` only say what that would do."""
    job = prepare(options)
    if options.dry_run or options.output is None:
        return summarize(job)
    require_space(options.output, job.output_bytes)
    with staged_folder(options.output, force=options.force) as folder:
        errors = _write(job, options, folder, progress)
    return summarize(job, errors, options.output)


def _write(job: Job, options: QuantizeOptions, folder: Path, progress: Progress) -> Mapping[str, float]:
    if job.backend == "streaming":
        hashes, errors = _write_streaming(job, folder, progress)
    else:
        hashes, errors = _write_modelopt(job, options, folder, progress)
    for relative in job.sidecars:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.checkpoint.directory / relative, folder / relative)
    others = sorted(_files(folder) - set(hashes))
    hashes = {**hashes, **dict(zip(others, sha256_of([folder / path for path in others]), strict=True))}
    (folder / FILE_NAME).write_bytes(json_bytes(_manifest(job, hashes, errors)))
    return errors


def _write_streaming(job: Job, folder: Path, progress: Progress) -> tuple[Mapping[str, str], Mapping[str, float]]:
    from qtool.quantization.pieces import work_bytes
    from qtool.quantization.streaming import quantize_streaming

    meter = Meter(work_bytes(job.plan), progress)
    result = quantize_streaming(job.checkpoint, job.plan, job.layout, folder, meter.advance)
    for name, data in job.small_files.items():
        (folder / name).write_bytes(data)
    return result.sha256, result.relative_errors


def _write_modelopt(
    job: Job, options: QuantizeOptions, folder: Path, progress: Progress
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    from qtool.quantization.modelopt import quantize_modelopt

    errors = quantize_modelopt(job.checkpoint, job.plan, folder, options.max_shard_bytes, progress)
    for name in set(job.small_files) - {INDEX}:  # ModelOpt cuts its own shards, so its index stays
        (folder / name).write_bytes(job.small_files[name])
    return {}, errors


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _manifest(job: Job, hashes: Mapping[str, str], errors: Mapping[str, float]) -> Mapping[str, Any]:
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
        tensors=[_tensor_facts(tensor, errors) for tensor in job.plan.tensors],
    )


def _config_hash(checkpoint: Checkpoint) -> str:
    return hashlib.sha256((checkpoint.directory / "config.json").read_bytes()).hexdigest()


def _tensor_facts(tensor: PlannedTensor, errors: Mapping[str, float]) -> Mapping[str, Any]:
    facts: dict[str, Any] = {
        "name": tensor.spec.hf_name, "action": tensor.action.value, "rule": tensor.rule, "reason": tensor.reason,
        "shape": list(tensor.source.shape), "from": tensor.source.dtype,
    }  # fmt: skip
    if tensor.action is Action.QUANTIZE:
        facts |= {"to": "NVFP4", "relative_error": float(f"{errors[tensor.spec.hf_name]:.4g}")}
    return facts
