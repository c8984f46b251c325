"""Several artefacts against one reference: a report for each, a table for all, and the reference scored once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from qtool.artefact import artefacts_of
from qtool.checks.findings import printable
from qtool.console import unwrapped
from qtool.errors import QtoolError, UsageError
from qtool.progress import StageProgress, ignore
from qtool.redaction import redacted
from qtool.reporting.comparison import INDEX, remove_comparison, render_beside, write_comparison
from qtool.reporting.console import render_console
from qtool.reporting.run import verify
from qtool.reporting.words import headline, number
from qtool.reporting.write import write_page
from qtool.results import Result
from qtool.storage.atomic import atomic_write, named_write_errors
from qtool.verify.case import REPORT, SharedReference, VerifyOptions, check_output, is_server
from qtool.verify.gates import Verdict
from qtool.verify.merge import read_report
from qtool.verify.paired import Comparison, compare_reports
from qtool.verify.report import Report

SCHEMA_VERSION: Final = 1
_WORST_FIRST: Final = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.UNGATED, Verdict.PASS)
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._-]+")
_SHOWN: Final = 300
_COLUMNS: Final = 3
_PLAIN: Final = "max"
"""The algorithm that rounds to nearest under scales of the largest values: what the others are to be better than."""


@dataclass(frozen=True)
class Verified:
    """One artefact and its report, in `folder` where there is an output; or the error that left it unjudged."""

    artefact: str
    folder: Path | None = None
    report: Report | None = None
    error: QtoolError | None = None

    @property
    def word(self) -> str:
        """The verdict, or "error"."""
        return self.report.verdict.value if self.report else "error"

    @property
    def summary(self) -> str:
        """What decided it, in one sentence."""
        if self.report is None:
            return self.error.message if self.error else ""
        return headline(self.report)

    @property
    def gated(self) -> dict[str, float]:
        """Of each gated metric the value that is nearest to its bound, or furthest beyond, on any panel."""
        values: dict[str, float] = {}
        for gate in self.report.gates if self.report else ():
            if gate.value is not None:
                worse = max if gate.max is not None else min
                values[gate.metric] = worse(values.get(gate.metric, gate.value), gate.value)
        return values

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        facts: dict[str, Any] = {"artefact": self.artefact, "folder": str(self.folder) if self.folder else None}
        facts["report"] = self.report.to_dict() if self.report else None
        error = self.error
        facts["error"] = (
            {"code": error.exit_code, "message": error.message, "hint": error.hint} if error is not None else None
        )
        return facts


@dataclass(frozen=True, repr=False)
class Reports(Result):
    """The reports on several artefacts, in the order in which they were named.

    `comparison` puts those that were scored side by side; None where there are less than two with a common panel.
    """

    artefacts: tuple[Verified, ...]
    comparison: Comparison | None = None

    @property
    def reports(self) -> tuple[Report, ...]:
        """The reports alone, of those that could be judged."""
        return tuple(each.report for each in self.artefacts if each.report is not None)

    @property
    def errors(self) -> tuple[QtoolError, ...]:
        """What left some of them unjudged."""
        return tuple(each.error for each in self.artefacts if each.error is not None)

    @property
    def verdict(self) -> Verdict | None:
        """The worst of all; None where none could be judged."""
        found = {report.verdict for report in self.reports}
        return next((verdict for verdict in _WORST_FIRST if verdict in found), None)

    @property
    def metrics(self) -> list[str]:
        """The gated metrics of any of them."""
        return list(dict.fromkeys(metric for each in self.artefacts for metric in each.gated))

    @property
    def passed(self) -> bool:
        """Whether all were judged and none failed."""
        return not self.errors and self.verdict is not Verdict.FAIL

    @property
    @override
    def headline(self) -> str:
        return ", ".join(f"{each.artefact}: {each.word}" for each in self.artefacts) + "."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "artefact": each.artefact,
                "verdict": each.word,
                "summary": each.summary,
                "folder": str(each.folder or ""),
                **{metric: each.gated.get(metric) for metric in self.metrics},
            }
            for each in self.artefacts
        ]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict.value if self.verdict else None,
            "artefacts": [each.to_dict() for each in self.artefacts],
            "comparison": self.comparison.to_dict() if self.comparison else None,
        }


def verify_each(
    targets: Sequence[str],
    options: VerifyOptions,
    progress: StageProgress = ignore,
    *,
    status: Callable[[str], None] = ignore,
    command: str = "",
) -> Reports:
    """Verify every artefact that `targets` name, each as `options` say, but for `artefact` and `output`.

    A folder or repository of several GGUF models counts as all of them. With an output each has a folder of its own in
    it; one alone has the output itself. An error of one among several is kept, and the others are verified.
    """
    artefacts = [each for target in targets for each in _expanded(target, options)]
    if not artefacts:
        raise UsageError("There is no artefact to verify.", "Name at least one.")
    if len(artefacts) == 1:
        report = verify(replace(options, artefact=artefacts[0]), progress, status=status, command=command)
        return Reports((Verified(artefacts[0], options.output, report),))
    folders = _folders(artefacts, options)
    shared = SharedReference()
    run = partial(verify, progress=progress, status=status, shared=shared, command=command)
    done: list[Verified] = []
    for place, (artefact, folder) in enumerate(zip(artefacts, folders, strict=True), start=1):
        status(f"[{place}/{len(artefacts)}] {artefact}")
        own = replace(options, artefact=artefact, output=folder)
        try:
            done.append(Verified(artefact, folder, _finished(own, shared, status) or run(own)))
        except QtoolError as error:
            if shared.reference is None:  # it would be the same for all
                raise
            status(f"error: {error.message}")
            done.append(Verified(artefact, folder, error=error))
    reports = Reports(tuple(done), _compared(done, command))
    if options.output is not None:
        if reports.comparison is not None:
            write_comparison(reports.comparison, options.output)
            for each in done:
                if each.report is not None and each.report.panels and each.folder is not None:
                    write_page(each.report, reports.comparison, each.folder)
        with atomic_write(options.output / INDEX) as file:
            file.write(json.dumps(reports.to_dict(), indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return reports


def _compared(done: Sequence[Verified], command: str) -> Comparison | None:
    """Those that were scored side by side: beside the one that was quantized without data, if there is one, or the first."""
    scored = [(str(each.folder or each.artefact), each.report) for each in done if each.report and each.report.panels]
    plain = [source for source, report in scored if report.made is not None and report.made.algorithm == _PLAIN]
    try:
        return redacted(compare_reports(scored, next(iter(plain), None), command=command))
    except UsageError:  # less than two, or of no common panel: each has a report all the same
        return None


def _expanded(target: str, options: VerifyOptions) -> list[str]:
    return [target] if is_server(target) else artefacts_of(target, options.revision, options.token)


def _finished(options: VerifyOptions, shared: SharedReference, status: Callable[[str], None]) -> Report | None:
    """The report on one of several that an interrupted run of all has finished, to be taken as it is."""
    if options.output is not None and (options.output / REPORT).exists() and not options.force:
        finished = read_report(options.output)
        if shared.is_of(finished, options):
            status(f"{options.output} holds the finished report.")
            return finished
    return None


def _folders(artefacts: Sequence[str], options: VerifyOptions) -> list[Path | None]:
    """A folder in the output for each artefact, all checked; a finished run of all is replaced with `force` only."""
    output = options.output
    if output is None:
        return [None for _ in artefacts]
    if (output / INDEX).exists() and not options.force:
        raise UsageError(f"{output} holds a finished verification.", "Pass --force to replace it.")
    if (output / REPORT).exists():
        raise UsageError(f"{output} holds the verification of one artefact.", "Choose another output folder.")
    folders = [output / name for name in folder_names(artefacts)]
    for folder in folders:
        check_output(folder, force=True)
    with named_write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / INDEX).unlink(missing_ok=True)
        remove_comparison(output)
    return [*folders]


def folder_names(artefacts: Sequence[str]) -> list[str]:
    """A folder's name for each: the last part of its own, made unique."""
    names: list[str] = []
    for artefact in artefacts:
        parts = [part for part in re.sub(r"^\w+://", "", artefact).split("/") if part not in ("", ".", "..")]
        last = parts[-1] if parts else artefact
        name = _NOT_IN_NAMES.sub("-", re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE)).strip("-.") or "artefact"
        if name.lower() in (each.lower() for each in names):
            name = next(
                new for n in range(2, len(artefacts) + 2) if (new := f"{name}-{n}").lower() not in map(str.lower, names)
            )
        names.append(name)
    return names


def render_reports(reports: Reports, output: Path | None = None) -> RenderableType:
    """Each report as it would be shown alone, then a table of all, and where they were written."""
    parts: list[RenderableType] = []
    for each in reports.artefacts:
        parts.append(Text(f"\n{printable(each.artefact, _SHOWN)}", style="bold"))
        if each.report is not None:
            parts.append(render_console(each.report))
        elif each.error is not None:
            hint = f"\n{each.error.hint}" if each.error.hint else ""
            parts.append(Text(printable(each.error.message, _SHOWN) + hint, style="bold red"))
    table = Table(title="\nAll artefacts", title_justify="left")
    shown = reports.metrics[:_COLUMNS]
    table.add_column("artefact", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for metric in shown:
        table.add_column(metric, justify="right")
    for each in reports.artefacts:
        lines = [each.artefact, *([each.summary] if each.report is None or not shown else [])]
        cells = ["\n".join(printable(line, _SHOWN) for line in lines), each.word]
        table.add_row(*map(Text, (*cells, *(number(each.gated.get(metric)) for metric in shown))))
    where = [unwrapped(f"Reports: {output}/*/report.html")] if output is not None else []
    beside = [render_beside(reports.comparison)] if reports.comparison is not None else []
    return Group(*parts, *beside, table, *where)
