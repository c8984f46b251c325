"""The summary of a quantization as a person reads it in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.console import human_size, written
from qtool.quantization.summary import QuantizationSummary, TensorClass

_BECOMES: Final = {"quantize": "NVFP4", "copy": "unchanged", "drop": "left out"}


def summary_table(summary: QuantizationSummary, output: Path | None, *, dry_run: bool) -> RenderableType:
    """One row a tensor class, why some stay as they are, the totals, and what to do next."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("modules", overflow="fold", max_width=36)
    table.add_column("becomes", no_wrap=True)
    for heading in ("tensors", "from", "to", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in summary.classes:
        table.add_row(*map(Text, _row(each)))
    reasons = [Text(f"{each.rule}: {each.reason}") for each in summary.classes if each.action != "quantize"]
    blank = Text("")
    return Group(table, blank, *reasons, blank, Text(_totals(summary)), _closing(output, dry_run=dry_run))


def _row(each: TensorClass) -> tuple[str, ...]:
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
    return (
        f"{summary.architecture}, task {summary.task} ({summary.task_source})\n"
        f"recipe {summary.recipe}, backend {summary.backend} ({summary.backend_reason})\n"
        f"{human_size(summary.source_bytes)} of weights -> {summary.output_bytes:,} bytes on disk ({ratio:.0%}), "
        f"{summary.bits_per_weight:.2f} bits per weight, about {human_size(summary.peak_memory_bytes)} of memory"
    )


def _closing(output: Path | None, *, dry_run: bool) -> Text:
    if dry_run or output is None:
        return Text("Dry run: nothing was written.")
    return written(output, "verify", " --reference MODEL")
