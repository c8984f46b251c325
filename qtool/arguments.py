"""Turns the words of a command line into the values that `run` functions take.

Rule: a word that means nothing is a UsageError that lists what would.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qtool.arch.spec import Task
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantization.job import Backend

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes in a size such as 500MB, 5GB or 1GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UsageError(f"{text!r} is no size.", "Write it as 500MB, 5GB or 1GiB.")
    return size


def parse_task(text: str | None) -> Task | None:
    """The task that --task names."""
    if text is None:
        return None
    if text not in {task.value for task in Task}:
        raise UsageError(f"--task is rerank or embed, not {text!r}.")
    return Task(text)


def parse_panels(panels: Sequence[str], dataset: str | None, columns: str | None) -> tuple[str, ...]:
    """The panels that --panel names, and the one that --dataset and --columns describe."""
    if (dataset is None) != (columns is None):
        raise UsageError(
            "--dataset and --columns go together.", "Write --dataset ID --columns query=COLUMN,positive=COLUMN."
        )
    from qtool.inputs.builtin import dataset_panel

    return (*panels, *([dataset_panel(dataset, columns)] if dataset and columns else []))


def parse_backend(text: str) -> Backend:
    """The backend that --backend names."""
    from qtool.quantization.job import BACKENDS

    for backend in BACKENDS:
        if backend == text:
            return backend
    raise UsageError(f"--backend is one of {', '.join(BACKENDS)}, not {text!r}.")
