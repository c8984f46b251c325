"""Runs whole processes and measures them from outside."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Measurement:
    """One run: wall-clock seconds, CPU seconds, and the peak of the resident set in bytes."""

    seconds: float
    cpu_seconds: float
    peak_rss: int


def run(command: Sequence[str], log: Path) -> Measurement:
    """Run `command` to its end, its output going to `log`; raises when it fails."""
    os.sync()  # what earlier runs left to be written is not this one's to wait for
    started = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measurement(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def middle(runs: Sequence[Measurement]) -> Measurement:
    """The medians of several runs; of the peaks the largest."""
    return Measurement(
        median(each.seconds for each in runs),
        median(each.cpu_seconds for each in runs),
        max(each.peak_rss for each in runs),
    )
