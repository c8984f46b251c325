"""The folder of a verification: every answer as it comes, then the reports.

Rule: a folder without a finished report is one to go on with; a finished one is replaced only when told to.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from qtool.errors import UsageError

REPORT: Final = "report.json"
ANSWERS: Final = "answers"


def prepare(folder: Path, *, force: bool) -> None:
    """Make `folder` ready for a run, new or continued. Raises UsageError on one that is finished or somebody else's."""
    is_finished = (folder / REPORT).exists()
    if is_finished and not force:
        raise UsageError(f"{folder} holds a finished verification.", "Pass --force to replace it.")
    if not is_finished and folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise UsageError(f"{folder} exists and is no verification's.", "Name a new folder.")
    if is_finished:
        (folder / REPORT).unlink()
        shutil.rmtree(folder / ANSWERS, ignore_errors=True)
    (folder / ANSWERS).mkdir(parents=True, exist_ok=True)


def _is_ours(folder: Path) -> bool:
    return (folder / ANSWERS).is_dir() or not any(folder.iterdir())
