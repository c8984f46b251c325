"""Calibration data: the sets that come with qtool, a panel's file or a data set, and the questions that they ask."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Final

from qtool import resources
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.errors import UsageError
from qtool.inputs.builtin import builtin_panels, calibration_file, calibration_sets, is_dataset, load_panels
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import Modality, Panel, Query
from qtool.scoring.scorer import distinct_pairs, document_content, query_content

TEXT_SETS: Final = ("general-text",)
VISION_SETS: Final = ("general-text", "general-pictures")
DEMO_SETS: Final = ("demo-calibration",)


def default_sets(opened: CheckpointArtefact) -> tuple[str, ...]:
    """The sets that fit a model: a demo model's own world, else texts, and pictures where it sees them."""
    if opened.path.resolve() in {resources.demo_model(name).resolve() for name in resources.demo_models()}:
        return DEMO_SETS
    return VISION_SETS if opened.family.is_vision else TEXT_SETS


def load_calibration(data: Sequence[str], limit: int | None = None) -> Panel:
    """The sets, panels (by name or path) or data sets `data` as one panel, their queries interleaved.

    `limit` takes the first queries of each. Raises UsageError for an unknown name or a broken file.
    """
    return joined(load_each(data, limit))


def load_each(data: Sequence[str], limit: int | None = None) -> list[Panel]:
    """Likewise, one panel each."""
    return load_panels([_find(name) for name in data], limit)


def joined(panels: Sequence[Panel]) -> Panel:
    """Panels as one, their queries interleaved."""
    if len(panels) == 1:
        return panels[0]
    modalities: set[Modality] = {panel.modality for panel in panels}
    return Panel(
        "+".join(panel.name for panel in panels),
        " AND ".join(dict.fromkeys(panel.license for panel in panels if panel.license)),
        modalities.pop() if len(modalities) == 1 else "mixed",
        "none",
        hashlib.sha256("".join(panel.sha256 for panel in panels).encode()).hexdigest(),
        _interleaved(panels),
    )


def _find(name: str) -> str:
    """A built-in set's file, or what `load_panels` takes."""
    if name in calibration_sets():
        return calibration_file(name)
    is_name = not is_dataset(name) and not Path(name).suffix and len(Path(name).parts) == 1
    if is_name and name not in builtin_panels():
        known = ", ".join((*calibration_sets(), *builtin_panels()))
        raise UsageError(f"Unknown calibration data {name!r}.", f"Choose one of {known}, or pass a path.")
    return name


def _interleaved(panels: Sequence[Panel]) -> tuple[Query, ...]:
    """The queries of all panels, such that any first part has the same share of each."""
    places = [
        ((number + 0.5) / len(panel.queries), query) for panel in panels for number, query in enumerate(panel.queries)
    ]
    return tuple(query for _, query in sorted(places, key=itemgetter(0)))


def questions(panel: Panel, task: Task, query_instruction: str | None) -> Sequence[Pair | Item]:
    """What the model is asked, each question once: pairs, a query's documents side by side, or queries and documents.

    `query_instruction` is the publisher's, for an embedder's queries without one.
    """
    if task is Task.RERANK:
        pairs = panel.pairs
        return [pairs[equal[0]] for equal in distinct_pairs(pairs)]
    found: dict[Hashable, Item] = {}
    for query in panel.queries:
        item = query.item if query.item.instruction else query.item.with_instruction(query_instruction)
        found.setdefault(("query", query_content(item)), item)
        for document in query.documents:
            bare = replace(document, instruction=None)
            found.setdefault(("document", document_content(bare)), bare)
    return list(found.values())
