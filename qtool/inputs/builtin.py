"""Panels by name or path: those that come with qtool and a user's own.

A word without suffix or slash is a built-in name, so a mistyped name is never reported as a missing file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qtool import resources
from qtool.errors import UsageError
from qtool.inputs.panels import Panel, load_panel

TEXT_PANELS: Final = ("demo-text",)
VISION_PANELS: Final = ("demo-text", "demo-image", "demo-mixed")
_FOLDER: Final = "calibration/panels"
_DATASET: Final = "dataset:"


def builtin_panels() -> list[str]:
    """Names of the panels that come with qtool."""
    return resources.names(_FOLDER, ".jsonl")


def default_panels(*, is_vision: bool) -> tuple[str, ...]:
    """The built-in panels that are used where the user names none."""
    return VISION_PANELS if is_vision else TEXT_PANELS


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


def load_panels(names_or_paths: Sequence[str], limit: int | None = None) -> list[Panel]:
    """Panels by name or path, each cut to its first `limit` queries; no two may share a name."""
    if limit is not None and limit < 1:
        raise UsageError(f"Invalid limit {limit}: expected at least 1 query.")
    panels = [_load(name, limit) for name in names_or_paths]
    check_panel_names(panels)
    return panels


def dataset_panel(dataset: str, columns: str) -> str:
    """The name by which `load_panels` loads the panel that --dataset and --columns describe."""
    return f"{_DATASET}{dataset}?{columns}"


def is_dataset(name: str) -> bool:
    """Whether `dataset_panel` made the name."""
    return name.startswith(_DATASET)


def _load(name: str, limit: int | None) -> Panel:
    if not is_dataset(name):
        return load_panel(find_panel(name)).first(limit)
    from qtool.inputs.datasets import load_dataset_panel, parse_dataset

    dataset, _, columns = name.removeprefix(_DATASET).partition("?")
    bound = {} if limit is None else {"limit": limit}
    return load_dataset_panel(parse_dataset(dataset, columns, **bound))


def check_panel_names(panels: Sequence[Panel]) -> None:
    """Raise UsageError where two panels have one name, by which reports refer to them."""
    names = [panel.name for panel in panels]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"Two panels are named {name!r}.", "Give them different names: reports refer to panels by name."
            )
