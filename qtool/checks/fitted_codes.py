"""The codes of weights that were fitted to data, in the stages weights and rederive. Part of the catalogue in findings.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qtool.checks.score_codes import Entry, broken, warning

_MAKE: Final = "qtool {maker} MODEL -o OUT"
_BOUNDED: Final = (
    "only the error of weights, rows and blocks was judged (up to {error}; {bound} is allowed), which does not show small "
    "changes."
)

# `-not-recorded`: other than what the artefact's manifest has of each weight.
FITTED_CODES: Final[Mapping[str, Entry]] = {
    "blocks-not-recorded": broken(
        "The {parts} of {tensor} are not those that qtool.json records, in {region}: bytes are damaged, or were changed "
        "after the artefact was made.",
        _MAKE,
    ),
    "weights-not-recorded": broken(
        "{tensors} near the reference's (relative error up to {error}), but the {parts} are not those that qtool.json "
        "records: they were changed after the artefact was made, or qtool.json is another artefact's.",
        _MAKE,
    ),
    "source-not-recorded": broken(
        "{tensor} is what qtool.json records, but was rounded from other weights than the reference's (relative error "
        "{error}): artefact and reference are of different revisions.",
        "hf download ORG/NAME {name} --local-dir {file}",
    ),
    "rows-zero": broken("{count} of {total} rows of {tensor} are all zeros; the reference's are not.", _MAKE),
    "rows-differ": broken(
        "{tensor} is near the reference's, but a row is off by {error} of its norm ({bound} is allowed), or {far} of {total} "
        "blocks by more than their own: the weights were changed.",
        _MAKE,
    ),
    "record-contradicted": warning(
        "{tensors} fitted to data, and the numbers of qtool.json contradict each other, so it was edited: " + _BOUNDED,
    ),
    "fitted-by-bound": (
        "note",
        "{tensors} fitted to data, and qtool.json has no checksums of them: " + _BOUNDED,
        "",
    ),
    "blocks-otherwise-rounded": warning(
        "{tensors} not rounded to nearest ({share} of the codes), as an algorithm such as GPTQ leaves them, or a change of the "
        "weights: without checksums " + _BOUNDED,
    ),
    "rederived-otherwise": warning(
        "{tensors} other bytes than calibrating again gives, which proves nothing under other conditions ({reasons}); rederive "
        "under the recorded ones, and compare the checksums with --weights.",
    ),
}
