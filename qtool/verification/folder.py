"""The folder of a verification: every answer as it comes, then the reports.

Rule: a folder without a finished report is one to go on with; a finished one is replaced only when told to, and nothing
is removed before all that can be refused was: `check_output` first, `prepare` last. Others write files of the same names,
so what is replaced or removed is looked into.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Final

from qtool.answers.lines import may_be_ledger
from qtool.answers.write_errors import named_write_errors
from qtool.errors import SetupError, UsageError

REPORT: Final = "report.json"
REPORTS: Final = (REPORT, "report.md", "report.html", "junit.xml")
ANSWERS: Final = "answers"
LEDGERS: Final = ("reference.jsonl", "noise.jsonl", "artefact.jsonl")


def check_output(folder: Path, *, force: bool) -> None:
    """Raise UsageError on a folder that is finished or somebody else's, SetupError on one that cannot be written."""
    with named_write_errors(folder):
        if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
            raise UsageError(f"{folder} exists and is no verification's.", "Name a new folder.")
        if (folder / REPORT).exists() and not force:
            raise UsageError(f"{folder} holds a finished verification.", "Pass --force to replace it.")
        _check_writable(folder)


def prepare(folder: Path, *, force: bool) -> None:
    """Make `folder` ready for a run, new or continued; `force` begins anew. Raises what `check_output` raises."""
    check_output(folder, force=force)
    with named_write_errors(folder):
        ledgers = [folder / ANSWERS / name for name in LEDGERS] if force else []
        for ledger in ledgers:
            _check_idle(ledger)
        # All reports at once, for a run that dies must not leave an older one's verdict beside its answers. Only files
        # that qtool wrote: the folder may hold others.
        for path in (*(folder / name for name in REPORTS), *ledgers):
            path.unlink(missing_ok=True)
        (folder / ANSWERS).mkdir(parents=True, exist_ok=True)


def _is_ours(folder: Path) -> bool:
    if (folder / REPORT).exists():
        return _is_report(folder / REPORT)
    if not (folder / ANSWERS).is_dir():
        return not any(folder.iterdir())
    ledgers = [path for path in (folder / ANSWERS / name for name in LEDGERS) if path.exists()]
    has_reports = any((folder / name).exists() for name in REPORTS)
    return all(map(may_be_ledger, ledgers)) and (bool(ledgers) or not has_reports)


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"artefact", "reference", "verdict"}


def _check_writable(folder: Path) -> None:
    """What `mkdir` would find out too late: after the models were fetched."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SetupError(f"{folder} cannot be written: {there} is no folder.", "Choose another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SetupError(f"{folder} cannot be written: {there} does not permit it.", "Choose another place.")


def _check_idle(ledger: Path) -> None:
    """Raise UsageError where a run is writing `ledger`: it would go on in a file that nobody finds."""
    if not ledger.exists():
        return
    with ledger.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another run is writing {ledger}.", "Wait for it, or choose another output.") from None
