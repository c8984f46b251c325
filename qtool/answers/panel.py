"""Which part of which panel is asked, under which instruction.

Rule: ids and order stay the panel's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.inputs.builtin import load_panels
from qtool.inputs.panels import Panel
from qtool.inputs.shards import Shard


@dataclass(frozen=True)
class PanelChoice:
    """A panel by name or path: its first `limit` queries, of these one shard; `instruction` replaces the queries' own."""

    source: str
    limit: int | None = None
    shard: Shard | None = None
    instruction: str | None = None

    def load(self) -> Panel:
        """Read and check it."""
        (panel,) = load_panels([self.source], self.limit)
        return _instructed(panel.shard(self.shard), self.instruction)


def _instructed(panel: Panel, instruction: str | None) -> Panel:
    if instruction is None:
        return panel
    changed = (replace(query, item=query.item.with_instruction(instruction)) for query in panel.queries)
    return replace(panel, queries=tuple(changed))
