"""The published report is read back, and so is one of the schema version before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.verify.gates import Verdict
from qtool.verify.report import SCHEMA_VERSION, Report, parse_report
from tests.reporting import reports

OLD = Path(__file__).with_name("report-v2.json").read_bytes()
"""As qtool wrote it before `hf_name` of a tensor became `tensor`."""


@pytest.mark.parametrize("name", reports.ALL)
def test_a_report_is_read_back(name: str) -> None:
    report = reports.ALL[name]()
    assert parse_report(report.to_json().encode(errors="backslashreplace")) == report


def test_a_report_of_version_2_is_read_as_one_of_today() -> None:
    report, old = parse_report(OLD), json.loads(OLD)
    assert (old["schema_version"], report.schema_version) == (2, SCHEMA_VERSION)
    assert [each.tensor for each in report.weights] == [each["hf_name"] for each in old["weights"]]
    assert len(report.weights) == 103
    assert (report.verdict, report.panels[0].pairs, report.noise.pairs) == (Verdict.INCONCLUSIVE, 6, 6)
    unknown = {"started": "", "command": "", "answers": [], "made": None}
    missing = {"nbytes": None, "revision": None, "parameters": None}
    unpaired = {"documents": [], "labels": [], "vector_errors": []}
    assert written(report) == {
        **old,
        **unknown,
        **{side: {**old[side], **missing} for side in ("artefact", "reference")},
        "panels": [{**panel, **unpaired} for panel in old["panels"]],
        "schema_version": SCHEMA_VERSION,
        "weights": [
            {"tensor" if key == "hf_name" else key: value for key, value in each.items()} for each in old["weights"]
        ],
    }


def written(report: Report) -> dict[str, object]:
    return json.loads(report.to_json())
