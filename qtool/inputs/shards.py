"""One share of a panel, so that several machines divide its queries among them.

Rule: the shards of a count hold each query once, whole, with all its documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtool.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, counted from 1: every `count`-th query from that one on."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"There is no shard {self}.", f"The shards of {self.count} are 1/{self.count} and so on.")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard as --shard names it, such as 2/8."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match:
            raise UsageError(f"{text!r} is no shard.", "Write it as 2/8: the second of eight.")
        return cls(int(match[1]), int(match[2]))
