"""The only module that prints: results to stdout, progress, status and errors to stderr.

All that it prints is without secrets and escape sequences (`escaping`), and so is what libraries log. Colour and bars appear on a terminal only (and never with NO_COLOR). A reader of stdout that leaves early, as `head` does,
changes no exit code. Rich is imported when it is needed, so that `--help` stays fast.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TextIO

from qtool.errors import QtoolError, UsageError
from qtool.escaping import printable, shown, shown_lines
from qtool.progress import PART, Progress, StageProgress, duration, ignore
from qtool.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID
    from rich.segment import Segment
    from rich.text import Text
    from typing_extensions import Self

_WIDTH_OF_FILES: Final = 160
"""Columns where the output is no terminal: wide enough for the names of files in tables."""


@dataclass
class Settings:
    """What the command line chose; a library caller gets bars, and no line is printed for it.

    `command` is what was typed, without secrets.
    """

    is_command: bool = False
    quiet: bool = False
    verbose: bool = False
    command: str = ""


settings: Final = Settings()


def configure(*, quiet: bool = False, verbose: bool = False) -> None:
    """Set up the output of a command; `quiet` shows results and errors only. Raises UsageError for both."""
    if quiet and verbose:
        raise UsageError("--quiet cannot be combined with --verbose.")
    settings.is_command = True
    settings.quiet = quiet
    settings.verbose = verbose
    _log_safely()
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
        logging.disable(logging.WARNING)
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


def _log_safely() -> None:
    """Whatever a library logs, and whichever handler writes it, is safe to show."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "is_safe", False):
        return

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = factory(*arguments, **options)
        with suppress(Exception):  # arguments that do not fit, which logging itself reports
            made.msg, made.args = shown_lines(made.getMessage()), None
        if made.exc_info and not made.exc_text:
            made.exc_text = shown_lines("".join(traceback.format_exception(*made.exc_info)).rstrip())
        return made

    record.is_safe = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


@cache
def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the process with 1
            _mute(self.file)

        def _render_buffer(self, buffer: Iterable[Segment]) -> str:
            # Whatever was laid out: rich itself drops five control characters, and not ESC.
            safe = (
                each if each.control else each._replace(text=printable(each.text, sys.maxsize, "\n")) for each in buffer
            )
            return super()._render_buffer(safe)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_FILES
    return QuietConsole(stderr=stderr, highlight=False, width=width)


@contextmanager
def _stdout() -> Iterator[TextIO]:
    try:
        yield sys.stdout
        sys.stdout.flush()  # at the exit of the process it would be too late to report what went wrong
    except BrokenPipeError:
        _mute(sys.stdout)


def _mute(stream: IO[str]) -> None:
    """Discard what the stream's buffer still holds, and all that follows."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


# Results and messages.


def show_status(message: str) -> None:
    """One line of status on stderr."""
    if not settings.quiet:
        _print_line(message)


def _print_line(message: str) -> None:
    _console(stderr=True).print(shown(message), markup=False, soft_wrap=True)


def show_result(result: RenderableType) -> None:
    """The result, for a person."""
    _console(stderr=False).print(_safe(result), crop=False)


def _safe(result: Any) -> Any:
    """The texts, tables and groups of a result with safe text: before they are laid out, so that columns stay straight."""
    from rich.console import Group
    from rich.protocol import rich_cast
    from rich.table import Table
    from rich.text import Text

    result = rich_cast(result)
    if isinstance(result, str):
        return shown_lines(result)
    if isinstance(result, Text):
        plain = shown_lines(result.plain)
        if plain == result.plain or (not plain and not result.plain.strip()):
            return result
        return Text(plain, result.style, justify=result.justify, overflow=result.overflow, no_wrap=result.no_wrap)
    if isinstance(result, Group):
        return Group(*map(_safe, result.renderables))
    if isinstance(result, Table):
        result.title, result.caption = _safe(result.title), _safe(result.caption)
        for column in result.columns:
            column.header, column.footer = _safe(column.header), _safe(column.footer)
            column._cells[:] = map(_safe, column._cells)  # noqa: SLF001 - rich lets one add cells, not change them
    return result


def unwrapped(line: str, style: str = "") -> Text:
    """A line of a result that somebody may copy, such as a command: it is never broken into several."""
    from rich.text import Text

    return Text(line, style, no_wrap=True, overflow="ignore")


def written(output: Path, command: str) -> Text:
    """What was written, and the command that says more about it."""
    return unwrapped(f"Wrote {output}. Next: qtool {command} {shlex.quote(str(output))}")


def verify_next(output: Path, artefact: Path, reference: str) -> Text:
    """What was written, and the whole command that proves that it scores as its source does."""
    command = shlex.join(["qtool", "verify", str(artefact), "--reference", reference, "--panel", "YOUR.jsonl"])
    return unwrapped(f"Wrote {output}. Next: {command}")


def show_line(result: str) -> None:
    """The result as one line to copy, however long."""
    show_lines([result])


def show_json(result: Mapping[str, Any]) -> None:
    """The result, for a program."""
    # ASCII, since a path may hold what stdout's encoding cannot: bytes that are not UTF-8, or any accent in a C locale.
    with _stdout() as stdout:
        stdout.write(json.dumps(redacted(result), indent=2, ensure_ascii=True) + "\n")


def show_lines(lines: Iterable[str]) -> None:
    """A result of many lines, however long."""
    with _stdout() as stdout:
        stdout.writelines(f"{_encodable(shown_lines(line, sys.maxsize), stdout)}\n" for line in lines)


def _encodable(text: str, stream: TextIO) -> str:
    """The text with escapes for what the stream's encoding lacks, such as any accent in a C locale."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show_error(error: QtoolError, *, as_json: bool = False) -> None:
    """The message and the hint on stderr, with a traceback where asked for; with `as_json` also as JSON on stdout."""
    if settings.verbose or os.environ.get("QTOOL_DEBUG") == "1":
        trace = shown_lines("".join(traceback.format_exception(error)))
        _console(stderr=True).print(trace, markup=False, soft_wrap=True)
    _show_labelled("error: ", "bold red", error.message)
    if error.hint:
        _show_labelled("hint:  ", "bold", error.hint)
    if as_json:
        facts = {"code": error.exit_code, "message": error.message, "hint": error.hint}
        show_json({"schema_version": 1, "error": facts})


def _show_labelled(label: str, style: str, message: str) -> None:
    from rich.text import Text

    # Further lines are indented, so that a file's name or a server's message cannot pose as a line of qtool's own.
    indented = shown_lines(message).replace("\n", "\n" + " " * len(label))
    _console(stderr=True).print(Text.assemble((label, style), indented), soft_wrap=True)


def human_size(nbytes: int) -> str:
    """A number of bytes in the unit that suits it (powers of 1000, as disks and hubs count)."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


# Progress. A terminal or a notebook shows bars; elsewhere a command prints a line for each stage and every 30 seconds,
# so that the log of a long run shows that it lives.


@contextmanager
def byte_bar(label: str) -> Iterator[Progress]:
    """A bar of bytes with rate and time left, which appears with the first byte."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    def in_bytes(done: int, total: int) -> str:
        return human_size(total) if done == total else f"{human_size(done)} of {human_size(total)}"

    with _shown(in_bytes, DownloadColumn(), TransferSpeedColumn()) as show:
        yield lambda done, total: show(label, done, total)


@contextmanager
def stage_bar(unit: str) -> Iterator[StageProgress]:
    """One bar for each stage of a job, with `unit`s a second and time left, which appears when its stage begins."""
    from rich.progress import MofNCompleteColumn, TextColumn

    def in_units(done: int, total: int) -> str:
        return f"{total:,} {unit}" if done == total else f"{done:,} of {total:,} {unit}"

    rate = TextColumn("{task.fields[rate]}" + f" {unit}/s")
    with _shown(in_units, MofNCompleteColumn(), TextColumn(unit), rate, unit=unit) as show:
        yield show


@contextmanager
def _shown(amount: Callable[[int, int], str], *columns: ProgressColumn, unit: str = "") -> Iterator[StageProgress]:
    status = _console(stderr=True)
    has_bars = status.is_terminal or (status.is_jupyter and find_spec("ipywidgets") is not None)
    if settings.quiet or not (has_bars or settings.is_command or status.is_jupyter):
        yield ignore
    elif has_bars:
        with _bar(status, *columns) as bar:
            tasks: dict[str, TaskID] = {}
            yield lambda label, done, total: _update(bar, tasks, label, done, total)
    else:
        with StageLines(amount, unit) as lines:
            yield lines.update


def _bar(status: Console, *amounts: ProgressColumn) -> Bar:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    label = TextColumn("{task.description}", markup=False)
    return RichProgress(label, BarColumn(), *amounts, TimeRemainingColumn(), console=status)


def _update(bar: Bar, tasks: dict[str, TaskID], label: str, done: int, total: int) -> None:
    stage = label.partition(PART)[0]
    if stage not in tasks:
        tasks[stage] = bar.add_task(shown(label), total=total, rate="-", completed=done)
    speed = bar.tasks[tasks[stage]].speed
    rate = "-" if speed is None else f"{speed:,.1f}"
    bar.update(tasks[stage], description=shown(label), completed=done, total=total, rate=rate)


class StageLines:
    """Progress as lines of a log: one at the end of each stage or part that takes a moment, and one every 30 seconds.

    With a `unit`, lines say how many of it came in a second, and in all how much time is left.
    """

    def __init__(
        self, amount: Callable[[int, int], str], unit: str = "", *, every: float = 30.0, least: float = 2.0
    ) -> None:
        self._amount = amount
        self._unit = unit
        self._every = every
        self._least = least
        self._begun: dict[str, tuple[float, int]] = {}
        self._ended: set[str] = set()
        self._state = _Point("Preparing", 0, 0, time.monotonic())
        self._part = self._state
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def update(self, label: str, done: int, total: int) -> None:
        """Keep the state for the next line; at the end of a stage, and of a part of one, print one."""
        now = time.monotonic()
        stage, _, part = label.partition(PART)
        begun, first = self._begun.setdefault(stage, (now, done))
        if self._part.label != label:
            before = self._part
            self._part = _Point(label, done, total, now)
            if before.label.startswith(f"{stage}{PART}") and self._takes_a_moment(now - before.begun):
                self._state = _Point(before.label, done, total, begun, first)
                _print_line(f"{before.label}: {now - before.begun:.1f} s{self._speed(now)}")
        if done < total:
            self._state = _Point(label, done, total, begun, first)
        elif not part and stage not in self._ended:  # a stage may report its end more than once
            self._ended.add(stage)
            self._state = _Point("Preparing", 0, 0, now)
            if self._takes_a_moment(now - begun):
                _print_line(f"{stage}: {self._amount(total, total)} in {now - begun:.1f} s")

    def _takes_a_moment(self, seconds: float) -> bool:
        return settings.verbose or seconds >= self._least

    def _speed(self, now: float) -> str:
        """How many units a second, and how much time is left at that speed."""
        state = self._state
        speed = (state.done - state.first) / max(now - state.begun, 1e-9)
        if not self._unit or speed <= 0 or state.done >= state.total:
            return ""
        return f", {speed:,.1f} {self._unit}/s, {duration((state.total - state.done) / speed)} left"

    def _repeat(self) -> None:
        while not self._stop.wait(self._every):
            state, now = self._state, time.monotonic()
            amount = f"{self._amount(state.done, state.total)} " if state.total else ""
            _print_line(f"{state.label}: {amount}after {now - state.begun:.0f} s{self._speed(now)}")


@dataclass(frozen=True)
class _Point:
    """Where a stage, or a part of one, is; it began at a time with `first` done."""

    label: str
    done: int
    total: int
    begun: float
    first: int = 0
