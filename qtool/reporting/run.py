"""The public `verify` and `merge_reports`: run or join a verification, then write its reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qtool.inputs.media import DISTRUST, MediaAccess
from qtool.progress import StageProgress, ignore
from qtool.redaction import redacted
from qtool.reporting.write import write_reports
from qtool.verify.case import SharedReference, VerifyOptions
from qtool.verify.merge import merge_runs
from qtool.verify.report import Report
from qtool.verify.run import run_verification


def verify(
    options: VerifyOptions,
    progress: StageProgress = ignore,
    *,
    status: Callable[[str], None] = ignore,
    shared: SharedReference | None = None,
    command: str = "",
) -> Report:
    """Prove, or disprove, that an artefact scores as its reference does.

    With `options.output`, that folder gets every answer as it comes and in the end the report in all its forms. `status`
    gets a line as each stage ends. Verifications of several artefacts pass the same `shared`; `command` is what the user
    typed, for the report.
    """
    report = redacted(run_verification(options, progress, status, shared=shared, command=command))
    if options.output is not None:
        write_reports(report, options.output)
    return report


def merge_reports(
    folders: Sequence[Path], output: Path, access: MediaAccess = DISTRUST, *, force: bool = False
) -> Report:
    """Join the shards of a verification, judge them as one run, and write answers and reports to `output`.

    `force` replaces a verification in `output`; `access` is what the panels may name. Raises UsageError on folders that are not all shards of one verification.
    """
    report = redacted(merge_runs(folders, output, access, force=force))
    write_reports(report, output)
    return report
