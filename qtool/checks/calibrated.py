"""What an artefact's manifest says against the data that it was calibrated on, and whether a panel holds that data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qtool.artefact import Artefact
from qtool.checks.declared import manifest_facts
from qtool.checks.findings import Finding, finding
from qtool.inputs.overlap import shared_keys
from qtool.inputs.panels import Panel


def calibration_findings(artefact: Artefact, panels: Sequence[Panel]) -> Iterator[Finding]:
    """The warnings of the calibration, and each of `panels` with documents that it was calibrated on."""
    facts = _facts(artefact)
    told = [warning for warning in facts.get("warnings") or () if isinstance(warning, str)]
    for warning in told:
        yield finding("calibration-warning", artefact.path, warning=warning)
    for panel in panels:
        documents = sum(len(query.documents) for query in panel.queries)
        if shared := _shared(facts, panel):
            counts = {"count": f"{shared:,}", "total": f"{documents:,}"}
            yield finding("calibration-panel", artefact.path, panel=panel.name, data=str(facts.get("name")), **counts)


def _shared(facts: Mapping[str, Any], panel: Panel) -> int:
    contents = facts.get("contents")
    try:
        return shared_keys(contents, panel) if isinstance(contents, str) else 0
    except ValueError:  # a manifest that was edited
        return 0


def _facts(artefact: Artefact) -> Mapping[str, Any]:
    """What the manifest says of the artefact's calibration."""
    facts = manifest_facts(artefact).get("calibration")
    return facts if isinstance(facts, Mapping) else {}
