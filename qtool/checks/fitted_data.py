"""The data that an artefact's weights were fitted to, found again by its hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.errors import UsageError
from qtool.inputs.builtin import (
    DATASET,
    builtin_panels,
    calibration_file,
    calibration_sets,
    is_dataset,
    load_panels,
)


@dataclass(frozen=True)
class FittedData:
    """What the manifest says under `calibration` of the data: its sources by name and SHA-256, and the limit of queries."""

    sources: tuple[tuple[str, str], ...]
    limit: int | None
    effort: Any

    @classmethod
    def of(cls, facts: Any) -> FittedData | None:
        """What a manifest's `calibration` says; None where weights were not fitted to data."""
        if not isinstance(facts, Mapping) or not isinstance(facts.get("sources"), list):
            return None
        sources = [each for each in facts["sources"] if isinstance(each, Mapping)]
        limit = facts.get("limit")
        return cls(
            tuple((str(each.get("name")), str(each.get("sha256"))) for each in sources),
            limit if isinstance(limit, int) and limit > 0 else None,
            facts.get("effort"),
        )

    def found_in(self, given: Sequence[str]) -> list[str | None]:
        """For each source the name to load it by: of `given` or of what comes with qtool; None where it is in neither.

        Raises UsageError where something was given, a source is not found, and a given one is none of them.
        """
        hashes = {self._sha256(name): name for name in given}
        found = [hashes.get(sha256) or self._builtin(name, sha256) for name, sha256 in self.sources]
        wrong = [name for sha256, name in hashes.items() if sha256 not in dict(map(reversed, self.sources))]  # type: ignore[arg-type]
        if wrong and None in found:
            name, sha256 = self.sources[found.index(None)]
            raise UsageError(
                f"{described(wrong[0])} is not the data that the weights were fitted to: its SHA-256 is "
                f"{self._sha256(wrong[0])}, expected {sha256} ({described(name)}).",
                "Pass the data that the artefact was quantized with, unchanged.",
            )
        return found

    def _sha256(self, name: str) -> str:
        (panel,) = load_panels([calibration_file(name) if name in calibration_sets() else name], self.limit)
        return panel.sha256

    def _builtin(self, name: str, sha256: str) -> str | None:
        is_known = name in (*calibration_sets(), *builtin_panels())
        return name if is_known and self._sha256(name) == sha256 else None

    def missing(self, found: Sequence[str | None]) -> str:
        """What is not here and how to give it, as sentences; empty where all is."""
        missing = [source for source, place in zip(self.sources, found, strict=True) if place is None]
        names = ", ".join(f"{described(name)}, SHA-256 {sha256}" for name, sha256 in missing)
        if not names:
            return ""
        options = {
            "--structure-only --dataset ID --columns ROLE=COLUMN,..." if is_dataset(name) else "--data FILE"
            for name, _ in missing
        }
        return (
            f"The weights were fitted to data that is not here: {names}. Pass it with {' and '.join(sorted(options))}."
        )


def described(name: str) -> str:
    """A source as a sentence names it."""
    if not is_dataset(name):
        return name
    place, _, columns = name.removeprefix(DATASET).partition("?")
    return f"data set {place} with --columns {columns}"
