"""What the keywords of the public functions come to: the options objects of their jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qtool.errors import UsageError
from qtool.options import Options, coerce

if TYPE_CHECKING:
    from qtool.scoring.runtime import RuntimeOptions

OptionsT = TypeVar("OptionsT", bound=Options)


def options_of(function: Callable[..., Any], kind: type[OptionsT], keywords: Mapping[str, Any]) -> OptionsT:
    """The options of a call: the object that was passed as first argument, else one made of the keywords."""
    first = next(iter(signature(function).parameters))
    given = keywords[first]
    if isinstance(given, kind):
        refuse_keywords(function, keywords, first, "progress")
        return given
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # each kind is a dataclass
    return kind(**{name: value for name, value in keywords.items() if name in known})


def refuse_keywords(function: Callable[..., Any], keywords: Mapping[str, Any], *allowed: str) -> None:
    """Raise UsageError where a keyword was passed beside an options object."""
    for name, parameter in signature(function).parameters.items():
        if name not in allowed and keywords[name] != parameter.default:
            raise UsageError(
                f"{name} cannot be combined with an options object.",
                f"Set {name} in the options, or pass keywords only.",
            )


def runtime_of(keywords: Mapping[str, Any]) -> RuntimeOptions:
    """The runtime's options among the keywords."""
    from qtool.scoring.runtime import RuntimeOptions

    chosen = {field.name: keywords[field.name] for field in fields(RuntimeOptions)}
    return RuntimeOptions(**{name: value for name, value in chosen.items() if (name, value) != ("llama_cpp", None)})


def panel_of(keywords: Mapping[str, Any]) -> Any:
    """The panel that the keywords describe."""
    from qtool.scoring.score import PanelChoice

    named = coerce("panel", keywords["panel"], str | None)
    panels = [*([named] if named is not None else []), *dataset_panels(keywords)]
    if len(panels) != 1:
        raise UsageError(
            f"Expected one panel, got {len(panels) or 'none'}.", "Pass a panel, or a dataset with its columns."
        )
    names = ("limit", "shard", "instruction", "allow_outside_files", "allow_local_addresses")
    return PanelChoice(panels[0], **{name: keywords[name] for name in names})


def texts_of(keywords: Mapping[str, Any]) -> Any:
    """The texts that the keywords name; None where a panel is embedded."""
    from qtool.scoring.embed import Texts

    texts = keywords["texts"]
    if texts is None:
        return None
    for name in ("panel", "dataset", "limit", "shard"):
        if keywords[name] is not None:
            raise UsageError(
                f"Arguments texts and {name} cannot be combined.",
                "Pass texts, or a panel or dataset with limit and shard.",
            )
    if isinstance(texts, (str, os.PathLike)):
        return Texts(coerce("texts", texts, Path), instruction=keywords["instruction"])
    return Texts(lines=coerce("texts", texts, tuple[str, ...]), instruction=keywords["instruction"])


def dataset_panels(keywords: Mapping[str, Any]) -> list[str]:
    """The panel that `dataset` and `columns` describe, if any."""
    from qtool.inputs.builtin import dataset_panel

    dataset = coerce("dataset", keywords["dataset"], str | None)
    columns = coerce("columns", keywords["columns"], str | None)
    if dataset is None and columns is None:
        return []
    if dataset is None or columns is None:
        raise UsageError(
            "Arguments dataset and columns must be given together.",
            "For example columns='query=COLUMN,positive=COLUMN'.",
        )
    return [dataset_panel(dataset, columns)]
