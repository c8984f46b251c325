"""What each metric means, in the words of every report and of docs/metrics.md; its name is the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_DISTANCES: Final[Mapping[str, str]] = {
    "rmse": "root mean square of Δ, a shift of all scores included",
    "rmse_centred": "the same of Δ minus its mean: what is left without that shift, and can change an order",
    "bias": "mean of Δ: a shift that moves thresholds but no ranking",
    "slope": "slope of the artefact's scores over the reference's: below 1 it is less sure of itself",
    "p50": "median of |Δ|",
    "p95": "95th percentile of |Δ|",
    "p99": "99th percentile of |Δ|",
    "max": "largest |Δ|",
}
MEANINGS: Final[Mapping[str, str]] = {
    **{f"log_odds_{name}": text for name, text in _DISTANCES.items()},
    **{f"similarity_{name}": f"{text}, of cosine similarities" for name, text in _DISTANCES.items()},
    "vector_rmse": "root mean square length of the difference between an item's two vectors",
    "vector_rmse_centred": "the same without the mean of all those differences",
    "vector_bias": "length of that mean: the way in which all vectors have moved alike",
    "cosine_p50": "cosine of each item's vector with the reference's, median",
    "cosine_p1": "cosine of each item's vector with the reference's, first percentile",
    "cosine_min": "cosine of each item's vector with the reference's, minimum",
    "similarity_spearman": (
        "Spearman correlation of the two models' similarities between all items, or 2,000 of them drawn with a fixed seed"
    ),
    "kendall_tau": "Kendall's τ-b of the two rankings of a query; 0 if the artefact gives one score to all",
    "weighted_tau": "Vigna's weighted τ, in which the top counts more; 0 if the artefact gives one score to all",
    "top1_agreement": "how often the artefact's first document is the reference's",
    "top5_agreement": "the share of the artefact's first five that the reference has there",
    "decisive_flips": (
        "of the pairs of documents that the reference tells apart by more than twice the noise floor's p99, the share "
        "that the artefact orders the other way"
    ),
    "ndcg10_reference": "the reference's nDCG at 10, gain 2^label - 1",
    "ndcg10_artefact": "the artefact's nDCG at 10",
    "ndcg10_drop": "nDCG at 10, reference minus artefact: what users lose",
    "recovery": "the artefact's nDCG at 10 in percent of the reference's",
    "mrr_reference": "one over the rank of the first document with a label above 0, in the reference",
    "mrr_artefact": "one over the rank of the first document with a label above 0, in the artefact",
    "mrr_drop": "that of the reference minus that of the artefact",
}
"""Of every metric but those of shortened vectors, in the order of the documentation."""


def meaning(metric: str) -> str:
    """What a metric means; empty for one that this version does not know."""
    name, _, dimensions = metric.partition("_mrl")
    shortened = f", of vectors cut to {dimensions} dimensions" if dimensions else ""
    return f"{MEANINGS[name]}{shortened}" if name in MEANINGS else ""
