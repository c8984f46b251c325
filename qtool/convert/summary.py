"""What a conversion does or did, in the few lines that a person wants.

Rule: the sizes of a dry run are those of the real one; what llama.cpp makes has a size only afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.console import human_size, written
from qtool.convert.files import INTERMEDIATE, PlannedFile
from qtool.convert.job import Job
from qtool.formats.ggml import NVFP4
from qtool.gguf_file.ignored_scales import SEEN_IN

SCHEMA_VERSION: Final = 1

_SCALES_DROPPED: Final = (
    f"llama.cpp (seen in {SEEN_IN}) ignores the NVFP4 scales of the feed-forward matrices in the qwen3vl architecture: there this "
    "file scores wrong. Verify it with the llama.cpp that will serve it, or serve Q8_0."
)
"""See `gguf_file.ignored_scales`."""


@dataclass(frozen=True)
class FileSummary:
    """One file. `nbytes` and `bits_per_weight` are None where llama.cpp decides them."""

    name: str
    role: str
    type: str
    tensors: int | None
    nbytes: int | None
    bits_per_weight: float | None


@dataclass(frozen=True)
class ConversionSummary:
    """All files, and the prompt that a reranker's carry."""

    architecture: str
    task: str
    task_source: str
    files: tuple[FileSummary, ...]
    rank_template: str | None
    warnings: tuple[str, ...]

    def to_json(self) -> Mapping[str, Any]:
        """The summary as `--json` prints it."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def summarize(job: Job, made: Mapping[str, int] | None = None) -> ConversionSummary:
    """The summary of a job; `made` are the sizes of the files that llama.cpp has made."""
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
        detection.architecture.name, job.task.value, detection.task_source, files, job.rank_template, _warnings(job)
    )


def _warnings(job: Job) -> tuple[str, ...]:
    is_nvfp4 = any(file.type.matrices is NVFP4 for file in job.files)
    return (_SCALES_DROPPED,) if is_nvfp4 and job.inventory.detection.architecture.is_vision else ()


def _summary(file: PlannedFile, number: int) -> FileSummary:
    layout = file.layouts[number]
    return FileSummary(
        layout.file_name, file.role, file.type.label, len(layout.places), layout.nbytes, file.bits_per_weight
    )


def summary_table(summary: ConversionSummary, output: Path | None, *, dry_run: bool) -> RenderableType:
    """One row a file, what the rank head answers to, and what to do next."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("type", no_wrap=True)
    for heading in ("tensors", "size", "bits/weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file in summary.files:
        table.add_row(file.name, file.type, *_numbers(file))
    lines = [f"{summary.architecture}, task {summary.task} ({summary.task_source})"]
    if summary.rank_template is not None:
        lines.append(f"rank head: yes and no rows; baked prompt: {summary.rank_template!r}")
    lines += [f"WARNING: {warning}" for warning in summary.warnings]
    return Group(table, Text(""), *map(Text, lines), _closing(summary, output, dry_run=dry_run))


def _closing(summary: ConversionSummary, output: Path | None, *, dry_run: bool) -> Text:
    if dry_run or output is None:
        return Text("Dry run: nothing was written.")
    # Of a file that was written in parts there is none of its name.
    return written(output if output.exists() else output.with_name(summary.files[0].name), "inspect")


def _numbers(file: FileSummary) -> tuple[str, str, str]:
    return (
        "" if file.tensors is None else f"{file.tensors:,}",
        "by llama.cpp" if file.nbytes is None else human_size(file.nbytes),
        "" if file.bits_per_weight is None else f"{file.bits_per_weight:.2f}",
    )
