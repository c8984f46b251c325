"""How a job reports its progress: it calls a function; `console` draws."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

Progress = Callable[[int, int], None]
"""Called with the amount done so far and the amount in all (bytes, or pairs)."""

StageProgress = Callable[[str, int, int], None]
"""Likewise for a job of several stages, with the stage's name first; after ", " it may say in which part of it the job is."""

PART: Final = ", "

Advance = Callable[[int], None]
"""Called with the amount that has just been done."""


def ignore(*_: object) -> None:
    """The callback of a caller that wants no progress, answers or lines."""


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours; nothing for no time."""
    if seconds < 0.05:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """Adds up the progress of several threads and reports the sum."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        """Count `amount` as done."""
        with self._lock:
            self._done += amount
            self._progress(self._done, self._total)

    def portion(self, amount: int) -> Progress:
        """The progress of a part of the work; the whole part counts as `amount`."""
        counted = 0

        def progress(done: int, total: int) -> None:
            nonlocal counted
            reached = amount * done // total
            self.advance(reached - counted)
            counted = reached

        return progress
