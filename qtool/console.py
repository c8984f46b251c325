"""How qtool talks: progress and status to stderr, the result alone to stdout.

Rule: nothing else in qtool prints. Colour and animation stop by themselves where nobody watches (and with NO_COLOR).
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape

from qtool.errors import QtoolError
from qtool.progress import Progress, StageProgress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID

_status = Console(stderr=True, highlight=False)
_result = Console(highlight=False)


def show_status(message: str) -> None:
    """One line of status."""
    _status.print(escape(message))


def show_result(result: RenderableType) -> None:
    """The result, for a person."""
    _result.print(result)


def show_line(result: str) -> None:
    """The result, to be copied: one line, however long."""
    sys.stdout.write(result + "\n")


def show_json(result: Mapping[str, Any]) -> None:
    """The result, for a program."""
    # ASCII, since a path may hold what stdout's encoding cannot say: a name that is no UTF-8, or any accent in a C locale.
    sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=True) + "\n")


def show_lines(lines: Iterable[str]) -> None:
    """A result of many lines, each as it is."""
    sys.stdout.writelines(f"{line}\n" for line in lines)


def show_error(error: QtoolError, *, debug: bool) -> None:
    """The message and the hint; with `debug` the traceback before them."""
    if debug:
        _status.print(escape("".join(traceback.format_exception(error))))
    _status.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        _status.print(f"[bold]hint:[/]  {escape(error.hint)}", soft_wrap=True)


@contextmanager
def byte_bar(label: str) -> Iterator[Progress]:
    """A bar of bytes with rate and time left, drawn on a terminal only, from the first byte on."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        tasks: dict[str, TaskID] = {}
        yield lambda done, total: _update(bar, tasks, label, done, total)


@contextmanager
def stage_bar(unit: str) -> Iterator[StageProgress]:
    """One bar for each stage of a job, with `unit`s a second and time left, each appearing when its stage begins."""
    from rich.progress import MofNCompleteColumn, TextColumn

    with _bar(MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}" + f" {unit}/s")) as bar:
        tasks: dict[str, TaskID] = {}
        yield lambda stage, done, total: _update(bar, tasks, stage, done, total)


def _bar(*amounts: ProgressColumn) -> Bar:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    label = TextColumn("{task.description}")
    return RichProgress(
        label, BarColumn(), *amounts, TimeRemainingColumn(), console=_status, disable=not _status.is_terminal
    )


def _update(bar: Bar, tasks: dict[str, TaskID], label: str, done: int, total: int) -> None:
    if label not in tasks:
        tasks[label] = bar.add_task(escape(label), total=total, rate="-")
    speed = bar.tasks[tasks[label]].speed
    rate = "-" if speed is None else f"{speed:,.1f}"
    bar.update(tasks[label], completed=done, total=total, rate=rate)


def human_size(nbytes: int) -> str:
    """A number of bytes in the unit that suits it (powers of 1000, as disks and hubs count)."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
