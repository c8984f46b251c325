"""What a calibration is remembered by: its data, its tokens, and what is to be said against it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from qtool.inputs.builtin import builtin_panels, calibration_file, calibration_sets, load_panels
from qtool.inputs.overlap import PanelContents, content_keys
from qtool.inputs.panels import Panel

ENOUGH: Final = 5
"""Tokens for each column of the widest input. With fewer, weights that are fitted to the data fit nothing else."""


@dataclass(frozen=True, kw_only=True)
class CalibrationFacts:
    """The data of a calibration with its hash, how many distinct tokens it has, and warnings.

    `contents` are short hashes of the documents, by which a verification finds them again in a panel.
    """

    name: str
    sha256: str
    license: str
    queries: int
    tokens: int
    picture_tokens: int
    contents: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The facts as an artefact's manifest holds them, under `calibration`."""
        return asdict(self)


def calibration_facts(
    data: Panel, *, text_tokens: int, picture_tokens: int, widest: int, is_vision: bool
) -> CalibrationFacts:
    """The facts of a calibration that has read `data`; `widest` is the largest number of columns of a linear."""
    tokens = text_tokens + picture_tokens
    warnings = (*shortcomings(data, tokens, widest, is_vision=is_vision), *_shared(data))
    return CalibrationFacts(
        name=data.name,
        sha256=data.sha256,
        license=data.license,
        queries=len(data.queries),
        tokens=tokens,
        picture_tokens=picture_tokens,
        contents=content_keys(data),
        warnings=warnings,
    )


def shortcomings(data: Panel, tokens: int, widest: int, *, is_vision: bool) -> tuple[str, ...]:
    """Warnings for data that has too few tokens, or lacks a modality that the model reads."""
    return (*_few(tokens, widest), *_missing(data, is_vision=is_vision))


def _few(tokens: int, widest: int) -> Iterator[str]:
    if tokens < ENOUGH * widest:
        yield (
            f"{tokens:,} tokens are fewer than {ENOUGH} times the widest input ({widest:,} columns); "
            f"use data of at least {ENOUGH * widest:,} tokens."
        )


def _missing(data: Panel, *, is_vision: bool) -> Iterator[str]:
    documents = [document for query in data.queries for document in query.documents]
    with_pictures = sum(document.has_pictures for document in documents)
    if is_vision and not with_pictures:
        yield f"None of the {len(documents):,} documents has a picture: pictures are likely to lose more than texts."
    if is_vision and with_pictures == len(documents):
        yield f"All of the {len(documents):,} documents have a picture: texts are likely to lose more than pictures."


def _shared(data: Panel) -> Iterator[str]:
    """A warning for each panel of qtool that shares documents; the sets of qtool are tested not to."""
    if data.sha256 in _set_hashes():
        return
    for panel in load_panels(builtin_panels()):
        if shared := PanelContents(panel).shared(data):
            yield (
                f"{shared:,} of the documents are in the panel {panel.name}, too: "
                "a verification on it flatters the artefact."
            )


def _set_hashes() -> Sequence[str]:
    """The hashes that the sets of qtool declare; a test holds them to their lines."""
    firsts = []
    for name in calibration_sets():
        with Path(calibration_file(name)).open(encoding="utf-8") as file:
            firsts.append(json.loads(file.readline())["sha256"])
    return firsts
