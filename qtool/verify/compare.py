"""Compares the scores of two models on one panel; an embedder's vectors item by item."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image

from qtool.errors import ModelError, QtoolError
from qtool.inputs.items import ImageSource, Item, Pair
from qtool.inputs.panels import Panel
from qtool.inputs.pictures import load_image
from qtool.verify.collect import PanelScores, by_query
from qtool.verify.metrics import (
    MRL_DIMENSIONS,
    MetricValue,
    QueryScores,
    Scores,
    distances,
    measure,
    vector_errors,
    vector_metrics,
)
from qtool.verify.report import PairDelta, PanelReport

# Small copies of pictures for the report: of fifty pairs they still fit into a mail.


LONGEST_SIDE: Final = 160
_FEW_COLOURS: Final = 256


def thumbnail(source: ImageSource) -> str:
    """The picture as a `data:` URL of at most 160 pixels a side: PNG where it has few colours, else JPEG."""
    picture = load_image(source)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if picture.getcolors(_FEW_COLOURS) else "jpeg"
    buffer = BytesIO()
    picture.save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


WORST_KEPT: Final = 10
_EXCERPT: Final = 60
_PICTURES_SHOWN: Final = 4


def compare(panel: Panel, reference: PanelScores, artefact: PanelScores, margin: float | None = None) -> MetricValue:
    """Every metric of a panel that both models scored; a decisive flip exchanges documents further apart than `margin`."""
    vectors = {} if reference.vectors is None and artefact.vectors is None else _vector_metrics(reference, artefact)
    measured = measure("similarity" if vectors else "log_odds", query_scores(panel, reference, artefact), margin)
    return MetricValue({**vectors, **measured.values}, measured.intervals, measured.queries)


def panel_report(panel: Panel, reference: PanelScores, artefact: PanelScores, measured: MetricValue) -> PanelReport:
    """The panel's part of the report."""
    errors = _vector_errors(panel, reference, artefact)
    labels = tuple(pair.document.label for pair in panel.pairs)
    return PanelReport(
        name=panel.name,
        sha256=panel.sha256,
        license=panel.license,
        modality=panel.modality,
        queries=len(panel.queries),
        pairs=len(panel.pairs),
        metrics=measured.values,
        worst=_worst(panel, reference.scores, artefact.scores),
        intervals=measured.intervals,
        by_modality=_by_modality(panel, reference, artefact),
        scores=tuple(zip(reference.scores.tolist(), artefact.scores.tolist(), strict=True)),
        documents=tuple(len(query.documents) for query in panel.queries),
        labels=labels if any(label is not None for label in labels) else (),
        vector_errors=() if errors is None else tuple(map(tuple, errors.tolist())),
    )


def _vector_metrics(reference: PanelScores, artefact: PanelScores) -> dict[str, float]:
    found = _matched(reference, artefact)
    for dimensions in MRL_DIMENSIONS:
        if reference.vectors is not None and dimensions < reference.vectors.shape[1]:
            cut = _matched(reference.shortened(dimensions), artefact.shortened(dimensions))
            found |= {f"{name}_mrl{dimensions}": value for name, value in cut.items()}
    return found


def _matched(reference: PanelScores, artefact: PanelScores) -> dict[str, float]:
    one, other = reference.vectors, artefact.vectors
    if one is None or other is None:
        raise ModelError("One of the two models gives vectors, the other does not.")
    if one.shape != other.shape:
        raise ModelError(f"The artefact's vectors have {other.shape[1]} dimensions, the reference's {one.shape[1]}.")
    return vector_metrics(one, other)


def query_scores(panel: Panel, reference: PanelScores, artefact: PanelScores) -> list[QueryScores]:
    """Both models' scores of each query's documents, with the errors of an embedder's vectors."""
    labels = (None if query.labels is None else np.array(query.labels) for query in panel.queries)
    sides = (by_query(panel, side.scores) for side in (reference, artefact))
    errors = _vector_errors(panel, reference, artefact)
    vectors = [None] * len(panel.queries) if errors is None else map(tuple, errors.tolist())
    return [QueryScores(*scores) for scores in zip(*sides, labels, vectors, strict=True)]


def _vector_errors(panel: Panel, reference: PanelScores, artefact: PanelScores) -> Scores | None:
    """The sums of `vector_errors` for each query; an item that several have counts to the first of them."""
    if reference.vectors is None or artefact.vectors is None or not panel.queries:
        return None
    owner = np.zeros(len(reference.vectors), dtype=np.intp)
    places = [place for place, query in enumerate(panel.queries) for _ in query.documents]
    for place, row in zip(reversed(places), reversed(reference.rows), strict=True):
        owner[list(row)] = place
    return vector_errors(reference.vectors, artefact.vectors, owner, len(panel.queries))


def _by_modality(panel: Panel, reference: PanelScores, artefact: PanelScores) -> Mapping[str, Mapping[str, float]]:
    kinds = np.array([modality_of(pair) for pair in panel.pairs])
    what = "log_odds" if reference.vectors is None else "similarity"
    return {
        str(kind): distances(what, [QueryScores(reference.scores[kinds == kind], artefact.scores[kinds == kind], None)])
        for kind in np.unique(kinds)
    }


def _worst(panel: Panel, reference: Scores, artefact: Scores) -> tuple[PairDelta, ...]:
    delta = artefact - reference
    order: Sequence[int] = np.argsort(-np.abs(delta), kind="stable")[:WORST_KEPT].tolist()
    pairs = panel.pairs
    return tuple(
        PairDelta(
            query_id=pairs[index].query.id,
            document_id=pairs[index].document.id,
            query=excerpt(pairs[index].query),
            document=excerpt(pairs[index].document),
            label=pairs[index].document.label,
            modality=modality_of(pairs[index]),
            reference=float(reference[index]),
            artefact=float(artefact[index]),
            delta=float(delta[index]),
            pictures=_pictures(pairs[index]),
        )
        for index in order
    )


def _pictures(pair: Pair) -> tuple[str, ...]:
    pictures = []
    for source in (*pair.query.image, *pair.document.image)[:_PICTURES_SHOWN]:
        with suppress(QtoolError):  # what lay at an address may be gone by now; the verdict does not depend on it
            pictures.append(thumbnail(source))
    return tuple(pictures)


def modality_of(pair: Pair) -> str:
    """`text`, `image` or `video`, or `mixed` for a pair of pictures and videos."""
    kinds = {kind for item in (pair.query, pair.document) for kind in ("image", "video") if getattr(item, kind)}
    return "mixed" if len(kinds) > 1 else next(iter(kinds), "text")


def excerpt(item: Item) -> str:
    """A few words or a file's name that identify the item for people."""
    pictures = (*(video.source for video in item.video), *item.image)
    shown = " ".join((*map(_picture_name, pictures), *item.joined_text.split()))
    return shown if len(shown) <= _EXCERPT else f"{shown[: _EXCERPT - 1]}…"


def _picture_name(source: ImageSource | tuple[ImageSource, ...]) -> str:
    if isinstance(source, tuple):
        return f"[{len(source)} frames]"
    if not isinstance(source, str) or source.startswith("data:"):
        return "[picture]"
    return f"[{source.rsplit('/', 1)[-1]}]"
