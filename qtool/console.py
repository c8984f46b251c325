"""How qtool talks: progress and status to stderr, the result alone to stdout.

Rule: nothing else in qtool prints. Colour and animation stop by themselves where nobody watches (and with NO_COLOR).
Who leaves, as `head` does, has seen enough: the command goes on and ends as it would have. Rich is imported by
what needs it: `--help` does not.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TextIO

from qtool.errors import QtoolError
from qtool.progress import Progress, StageProgress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID
    from rich.text import Text

_WIDTH_OF_FILES: Final = 160
"""Columns where no terminal says how many: room for the names of files in tables."""


@cache
def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the process with 1
            _mute(self.file)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_FILES
    return QuietConsole(stderr=stderr, highlight=False, width=width)


@contextmanager
def _stdout() -> Iterator[TextIO]:
    try:
        yield sys.stdout
        sys.stdout.flush()  # at the exit it would be too late to say what went wrong
    except BrokenPipeError:
        _mute(sys.stdout)


def _mute(stream: IO[str]) -> None:
    """Send to nowhere what its buffer still holds, and whatever comes."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def show_status(message: str) -> None:
    """One line of status."""
    _console(stderr=True).print(message, markup=False, soft_wrap=True)


def show_result(result: RenderableType) -> None:
    """The result, for a person."""
    _console(stderr=False).print(result, crop=False)


def unwrapped(line: str, style: str = "") -> Text:
    """A line of a result that somebody may copy, such as a command: a terminal may break it to show it, nothing here does."""
    from rich.text import Text

    return Text(line, style, no_wrap=True, overflow="ignore")


def written(output: Path, command: str, arguments: str = "") -> Text:
    """What was written, and the command that says more about it."""
    return unwrapped(f"Wrote {output}. Next: qtool {command} {shlex.quote(str(output))}{arguments}")


def show_line(result: str) -> None:
    """The result, to be copied: one line, however long."""
    with _stdout() as stdout:
        stdout.write(result + "\n")


def show_json(result: Mapping[str, Any]) -> None:
    """The result, for a program."""
    # ASCII, since a path may hold what stdout's encoding cannot say: a name that is no UTF-8, or any accent in a C locale.
    with _stdout() as stdout:
        stdout.write(json.dumps(result, indent=2, ensure_ascii=True) + "\n")


def show_lines(lines: Iterable[str]) -> None:
    """A result of many lines, each as it is."""
    with _stdout() as stdout:
        stdout.writelines(f"{line}\n" for line in lines)


def show_error(error: QtoolError, *, debug: bool) -> None:
    """The message and the hint; with `debug` the traceback before them."""
    if debug:
        show_status("".join(traceback.format_exception(error)))
    _show_labelled("error: ", "bold red", error.message)
    if error.hint:
        _show_labelled("hint:  ", "bold", error.hint)


def _show_labelled(label: str, style: str, message: str) -> None:
    from rich.text import Text

    _console(stderr=True).print(Text.assemble((label, style), message), soft_wrap=True)


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

    label = TextColumn("{task.description}", markup=False)
    status = _console(stderr=True)
    return RichProgress(
        label, BarColumn(), *amounts, TimeRemainingColumn(), console=status, disable=not status.is_terminal
    )


def _update(bar: Bar, tasks: dict[str, TaskID], label: str, done: int, total: int) -> None:
    if label not in tasks:
        tasks[label] = bar.add_task(label, total=total, rate="-")
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
