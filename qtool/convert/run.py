"""`convert_gguf`: plan, check, write, describe.

Rule: everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qtool.checkpoint.hashing import sha256_of
from qtool.checkpoint.writer import (
    check_target,
    check_target_file,
    manifest_of,
    require_space,
    staged_files,
    staged_folder,
)
from qtool.convert.engine import write_tensors
from qtool.convert.files import INTERMEDIATE, PlannedFile
from qtool.convert.job import Job, prepare
from qtool.convert.llama_quantize import Quantizer, find_quantizer
from qtool.convert.options import ConvertOptions
from qtool.convert.summary import ConversionSummary, summarize
from qtool.jsonfile import json_bytes
from qtool.manifest import FILE_NAME, manifest, versions
from qtool.progress import Meter, Progress, no_progress


def convert_gguf(options: ConvertOptions, progress: Progress = no_progress) -> ConversionSummary:
    """Convert `options.model` to GGUF files in `options.output`, or with `dry_run` only say which."""
    output = options.output
    if output is not None and not options.dry_run:
        (check_target_file if options.is_file else check_target)(output, force=options.force)
    job = prepare(options)
    if options.dry_run or output is None:
        return summarize(job)
    quantizer = find_quantizer() if job.quantized else None
    require_space(output, sum(file.nbytes for file in job.files))
    with _staged(output, options) as folder:
        sizes = _write(job, options, quantizer, folder, progress)
    return summarize(job, sizes)


def _staged(output: Path, options: ConvertOptions) -> AbstractContextManager[Path]:
    return (staged_files if options.is_file else staged_folder)(output, force=options.force)


def _write(
    job: Job, options: ConvertOptions, quantizer: Quantizer | None, folder: Path, progress: Progress
) -> Mapping[str, int]:
    """Write everything into `folder`; the size of each file that llama.cpp made."""
    source_bytes = sum(file.nbytes for file in job.files if file.role == INTERMEDIATE)
    work = sum(file.work_bytes for file in job.files) + source_bytes * len(job.quantized)
    meter = Meter(work, progress)
    hashes = [write_tensors(file.layouts, file.tensors, folder, meter.advance) for file in job.files]
    made = _quantize(job, options, quantizer, folder, meter) if quantizer else {}
    kept = [_file_facts(file, own) for file, own in zip(job.files, hashes, strict=True) if file.role != INTERMEDIATE]
    manifest_name = manifest_of(options.output).name if options.is_file and options.output else FILE_NAME
    (folder / manifest_name).write_bytes(json_bytes(_manifest(job, options, kept, made)))
    return {name: (folder / name).stat().st_size for name in made}


def _quantize(job: Job, options: ConvertOptions, quantizer: Quantizer, folder: Path, meter: Meter) -> Mapping[str, str]:
    """Let llama.cpp make its types from the lossless file, which goes; the SHA-256 of each by name."""
    (source,) = (folder / file.layouts[0].file_name for file in job.files if file.role == INTERMEDIATE)
    for type_name, file_name in job.quantized.items():
        quantizer.quantize(source, folder / file_name, type_name, options.imatrix, meter.portion(source.stat().st_size))
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
    job: Job, options: ConvertOptions, files: list[Mapping[str, Any]], quantized: Mapping[str, str]
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
    )
