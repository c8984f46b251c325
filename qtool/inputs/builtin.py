"""Panels by name or path: those that come with qtool and a user's own.

A word without suffix or slash is a built-in name, so a mistyped name is never reported as a missing file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qtool import resources
from qtool.errors import UsageError
from qtool.inputs.media import DISTRUST, MediaAccess
from qtool.inputs.panels import Panel, load_panel

DEMO_PANELS: Final = ("demo-text", "demo-image", "demo-mixed")
"""Coloured shapes, which only the demo models were trained on."""
GENERAL_PANELS: Final = ("retrieval-text", "retrieval-image")
"""Real texts, and pages and charts, for every other model."""
_SETS: Final = "calibration"
_FOLDER: Final = "calibration/panels"
DATASET: Final = "dataset:"
"""How the name of a panel begins that is taken from a data set."""


def builtin_panels() -> list[str]:
    """Names of the panels that come with qtool."""
    return resources.names(_FOLDER, ".jsonl")


def calibration_sets() -> list[str]:
    """Names of the calibration sets that come with qtool."""
    return resources.names(_SETS, ".jsonl")


def calibration_file(name: str) -> str:
    """The file of one of them, as `load_panels` takes it."""
    return str(resources.path(f"{_SETS}/{name}.jsonl"))


def default_panels(*, is_vision: bool, is_demo: bool) -> tuple[str, ...]:
    """The built-in panels that are used where the user names none; the first of each kind is for text models."""
    panels = DEMO_PANELS if is_demo else GENERAL_PANELS
    return panels if is_vision else panels[:1]


def demo_panels_among(panels: Sequence[Panel]) -> tuple[str, ...]:
    """The names of those that hold the lines of a demo panel, whatever they are called and wherever they lie."""
    known = {_declared_sha256(name) for name in DEMO_PANELS}
    return tuple(panel.name for panel in panels if panel.sha256 in known)


def _declared_sha256(name: str) -> str:
    with find_panel(name).open(encoding="utf-8") as file:
        sha256: str = json.loads(file.readline())["sha256"]
    return sha256


def find_panel(name_or_path: str) -> Path:
    """The file of a built-in panel, or a user's own (anything with a suffix or a slash)."""
    path = Path(name_or_path)
    if path.suffix or len(path.parts) > 1:
        return path
    if name_or_path not in builtin_panels():
        raise UsageError(
            f"Unknown panel {name_or_path!r}.", f"Choose one of {', '.join(builtin_panels())}, or pass a path."
        )
    return resources.path(f"{_FOLDER}/{name_or_path}.jsonl")


def load_panels(names_or_paths: Sequence[str], limit: int | None = None, access: MediaAccess = DISTRUST) -> list[Panel]:
    """Panels by name or path, each cut to its first `limit` queries; no two may share a name.

    `access` is what they may name beside the files in their own folders and what is public.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"Invalid limit {limit}: expected at least 1 query.")
    panels = [_load(name, limit, access) for name in names_or_paths]
    check_panel_names(panels)
    return panels


def dataset_panel(dataset: str, columns: str) -> str:
    """The name by which `load_panels` loads the panel that --dataset and --columns describe."""
    return f"{DATASET}{dataset}?{columns}"


def source_name(name: str) -> str:
    """How a manifest remembers a panel that `load_panels` was asked for: without the folders of a path."""
    prefix = DATASET if is_dataset(name) else ""
    place, mark, columns = name.removeprefix(prefix).partition("?") if prefix else (name, "", "")
    is_path = bool(Path(place).suffix) if not prefix else Path(place.partition("#")[0]).exists()
    return f"{prefix}{Path(place).name if is_path else place}{mark}{columns}"


def is_dataset(name: str) -> bool:
    """Whether `dataset_panel` made the name."""
    return name.startswith(DATASET)


def _load(name: str, limit: int | None, access: MediaAccess) -> Panel:
    if not is_dataset(name):
        # Our own panels are trusted: some installers link to the files of a package.
        ours = MediaAccess(outside_files=True)
        return load_panel(find_panel(name), ours if name in builtin_panels() else access).first(limit)
    from qtool.inputs.datasets import load_dataset_panel, parse_dataset

    dataset, _, columns = name.removeprefix(DATASET).partition("?")
    bound = {} if limit is None else {"limit": limit}
    return load_dataset_panel(parse_dataset(dataset, columns, **bound), access)


def check_panel_names(panels: Sequence[Panel]) -> None:
    """Raise UsageError where two panels have one name, by which reports refer to them."""
    names = [panel.name for panel in panels]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"Two panels are named {name!r}.", "Give them different names: reports refer to panels by name."
            )
