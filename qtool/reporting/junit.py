"""The report as JUnit XML for CI systems: each stage, and each gate on each panel, is a test case.

JUnit has no third outcome, so an inconclusive one is marked as skipped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from qtool.checks.stage import Stage
from qtool.reporting.words import bound, headline
from qtool.verify.gates import GateResult
from qtool.verify.report import Report

_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Case:
    name: str
    outcome: str
    message: str
    details: str = ""
    seconds: float = 0.0


def render_junit(report: Report) -> str:
    """The whole document."""
    root = ET.Element("testsuites", name=_clean(f"qtool verify {report.artefact.name}"), time=f"{report.seconds:.3f}")
    suites = {"stages": [_stage(stage) for stage in report.stages]}
    for gate in report.gates:
        suites.setdefault(f"gates on {gate.panel}", []).append(_gate(gate))
    for name, cases in suites.items():
        if cases:
            _add_suite(root, name, cases)
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    properties = {"verdict": report.verdict.value, "summary": headline(report), "reference": report.reference.name}
    for suite in root[:1]:  # where the usual schema has properties
        parent = ET.Element("properties")
        for name, value in properties.items():
            ET.SubElement(parent, "property", name=name, value=_clean(value))
        suite.insert(0, parent)
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document.decode() + "\n"


def _add_suite(root: ET.Element, name: str, cases: Sequence[_Case]) -> None:
    failures = sum(case.outcome == "fail" for case in cases)
    skipped = sum(case.outcome in ("skipped", "inconclusive") for case in cases)
    seconds = sum(case.seconds for case in cases)
    counts = {"tests": len(cases), "failures": failures, "errors": 0, "skipped": skipped}
    suite = ET.SubElement(root, "testsuite", {"name": _clean(name), **{key: str(n) for key, n in counts.items()}})
    suite.set("time", f"{seconds:.3f}")
    for case in cases:
        element = ET.SubElement(suite, "testcase", classname=_clean(f"qtool.{name}"), name=_clean(case.name))
        element.set("time", f"{case.seconds:.3f}")
        _add_outcome(element, case)


def _add_outcome(element: ET.Element, case: _Case) -> None:
    message, details = _clean(case.message), _clean(case.details)
    if case.outcome == "fail":
        ET.SubElement(element, "failure", message=message, type="fail").text = details
    elif case.outcome == "skipped":
        ET.SubElement(element, "skipped", message=message)
    elif case.outcome == "inconclusive":
        ET.SubElement(element, "skipped", message=f"inconclusive: {message}")
    elif details:
        ET.SubElement(element, "system-out").text = details


def _stage(stage: Stage) -> _Case:
    findings = "\n".join(
        f"{each.code} ({each.severity.value}): {each.sentence} {each.remedy}" for each in stage.findings
    )
    return _Case(stage.name, stage.outcome.value, stage.summary, findings, stage.seconds)


def _gate(gate: GateResult) -> _Case:
    return _Case(f"{gate.metric} {bound(gate)}", gate.outcome.value, gate.reason, gate.reason)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
