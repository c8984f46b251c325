"""Where the recipes and calibration data lie, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PACKAGED = Path(__file__).parent / "_data"
_CHECKOUT = Path(__file__).parent.parent
_DEMO_MODELS = Path(__file__).parent / "demo" / "models"

DEFAULT_RECIPE: Final = "nvfp4-w4a16"
"""The recipe where none is named; its gates also judge an artefact that carries no recipe."""


def path(relative: str) -> Path:
    """The file or folder `relative` (such as `recipes`), which a wheel carries under `qtool/_data`."""
    packaged = _PACKAGED / relative
    return packaged if packaged.exists() else _CHECKOUT / relative


def demo_models() -> list[str]:
    """Names of the models that come with qtool."""
    return sorted(path.name for path in _DEMO_MODELS.glob("*") if path.is_dir())


def demo_model(name: str) -> Path:
    """The folder of a model that comes with qtool."""
    return _DEMO_MODELS / name
