"""What a suite of benchmarks is made of: jobs, which are command lines, and goals for what was measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench.processes import Measurement

Measured = Mapping[str, Measurement]
Jobs = dict[str, list[str]]


@dataclass(frozen=True)
class Goal:
    """A number with a bound, or without one, for information; `needs` names the runs that it is computed from."""

    text: str
    number: Callable[[Measured], float]
    needs: tuple[str, ...]
    least: float | None = None
    most: float | None = None

    @property
    def is_informative(self) -> bool:
        """Whether it has no bound."""
        return self.least is None and self.most is None

    def is_met(self, value: float) -> bool:
        """Whether `value` is within its bounds."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def faster(text: str, slow: str, fast: str, least: float) -> Goal:
    """`fast` takes at most a `least`-th of `slow`'s time."""
    return Goal(
        f"{text}, at least {least:g} times faster", lambda m: m[slow].seconds / m[fast].seconds, (slow, fast), least
    )


def within(text: str, name: str, megabytes: int) -> Goal:
    """`name` needs no more memory than that."""
    return Goal(
        f"{text}, at most {megabytes} MB at its peak", lambda m: m[name].peak_rss / 1e6, (name,), most=megabytes
    )


def source_bytes(folder: Path) -> int:
    """Bytes of a checkpoint."""
    return sum(path.stat().st_size for path in folder.iterdir())


def qtool(*arguments: str) -> list[str]:
    """The command line of a whole qtool process."""
    return [sys.executable, "-m", "qtool", *arguments]
