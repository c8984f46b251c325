"""Console, Markdown, JUnit, JSON schema, and how they are written."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from rich.console import Console

from qtool.checks.stage import Outcome
from qtool.errors import SetupError
from qtool.reporting import console, junit, markdown, words
from qtool.reporting.html import render_html
from qtool.reporting.write import report_schema, write_reports
from qtool.verify.gates import Verdict
from qtool.verify.metrics import METRICS, Interval
from qtool.verify.report import SCHEMA_VERSION
from tests.reporting import reports


def shown(report, tmp_path):
    with (tmp_path / "out").open("w", encoding="utf-8", errors="replace") as file:
        screen = Console(width=120, record=True, file=file)
        screen.print(console.render_console(report))
    return screen.export_text()


def test_the_console_shows_stages_intervals_worst_pairs_gates_and_last_the_verdict(tmp_path):
    text = shown(reports.whole(), tmp_path)
    for phrase in ("structure", "far: Too far.", "log-odds, RMSE", "0.0312 … 0.0399", "Worst pairs of balls", "≤ 0.03"):
        assert phrase in text
    assert text.strip().endswith("FAIL: weights failed; 1 of 2 gates failed on 3 pairs, 1 skipped.")


@pytest.mark.parametrize("name", reports.ALL)
def test_the_console_obeys_no_stranger(name, tmp_path):
    text = shown(reports.ALL[name](), tmp_path)
    assert "\x1b" not in text
    assert "\x00" not in text


def test_metrics_stages_and_headings_have_the_same_name_in_every_form(tmp_path):
    whole = reports.whole()
    page = re.sub(r"\s+", " ", render_html(whole))
    people = {"console": shown(whole, tmp_path), "Markdown": markdown.render_markdown(whole), "HTML": page}
    every = {**people, "JUnit": junit.render_junit(whole)}
    for form, text in every.items():
        for name in (*(stage.name for stage in whole.stages), *(words.label(gate.metric) for gate in whole.gates)):
            assert name in text, (form, name)
        assert not any(gate.metric in text for gate in whole.gates), form
    for form, text in people.items():
        for heading in ("Stages", "Metrics", "Gates of the recipe tiny", *words.GATE_COLUMNS):
            assert heading in text, (form, heading)


def test_headlines_say_what_follows():
    whole = reports.whole()
    held = tuple(replace(stage, outcome=Outcome.PASS) for stage in whole.stages)
    passed = replace(whole, stages=held, gates=whole.gates[1:], verdict=Verdict.PASS)
    assert words.headline(passed) == "the gate passed on 3 pairs, 1 skipped."
    assert words.headline(replace(passed, gates=())) == "3 pairs compared; no gate applied."
    assert words.headline(reports.structure_only()) == "structure passed; nothing was scored."
    assert words.headline(reports.empty()) == "nothing was scored."
    open_one = replace(passed, stages=whole.stages[:3], verdict=Verdict.INCONCLUSIVE)
    assert words.headline(open_one) == "prompt is inconclusive; the gate passed on 3 pairs, 1 skipped."
    judged = (replace(whole.stages[3], name="scores"),)
    assert words.headline(replace(whole, stages=judged)) == "1 of 2 gates failed on 3 pairs, 1 skipped."


def test_numbers_have_the_digits_they_can_bear():
    shown = {None: "-", -0.0: "0", 1.0: "1.0000", 0.98765: "0.9877", -12.3456: "-12.35", 12345.6: "12,346",
             0.00012: "1.2e-04", float("nan"): "nan"}  # fmt: skip
    assert [words.number(value) for value in shown] == list(shown.values())
    assert words.interval(Interval(-1, 2)) == "-1.0000 … 2.0000"
    assert [words.duration(s) for s in (0.25, 119.9, 600, 8000)] == ["0.2 s", "119.9 s", "10 min", "2 h 13 min"]


def test_every_metric_has_a_name_for_people():
    assert [metric for names in METRICS.values() for metric in names if words.label(metric) == metric] == []


def test_markdown_begins_with_the_verdict_and_keeps_its_tables_whole():
    for make in reports.ALL.values():
        text = markdown.render_markdown(make())
        columns = 0
        for line in text.splitlines():
            bars = line.count("|")
            assert not line.startswith("|") or not columns or bars == columns, line
            columns = bars if line.startswith("|") else 0
    text = markdown.render_markdown(reports.whole())
    assert text.startswith("# ❌ FAIL: model-NVFP4\n\nweights failed; 1 of 2 gates failed on 3 pairs, 1 skipped.\n")
    for phrase in ("0.0353 (0.0312 … 0.0399)", "which ball?", "| b.safetensors | differs |", "median 0.0100"):
        assert phrase in text


def test_markdown_shows_what_a_stranger_wrote_as_text():
    text = markdown.render_markdown(reports.hostile())
    assert "<script" not in text
    assert "<img" not in text
    assert "\\[z\\](u)" in text
    assert "\\*y\\*" in text


@pytest.mark.parametrize("name", reports.ALL)
def test_junit_parses_and_its_counts_are_those_of_its_cases(name):
    root = ET.fromstring(junit.render_junit(reports.ALL[name]()))  # noqa: S314 - our own
    assert root.tag == "testsuites"
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in root:
        assert suite.tag == "testsuite"
        cases = suite.findall("testcase")
        assert {element.tag for element in suite} <= {"properties", "testcase"}
        found = {"tests": len(cases), "errors": 0}
        found |= {
            key: len(suite.findall(f"testcase/{tag}")) for key, tag in (("failures", "failure"), ("skipped", "skipped"))
        }
        for key, count in found.items():
            assert int(suite.get(key)) == count
            totals[key] += count
        assert all(case.get("name") and case.get("classname") and float(case.get("time")) >= 0 for case in cases)
    assert {key: int(root.get(key)) for key in totals} == totals


def test_junit_says_what_failed_and_what_stayed_open():
    root = ET.fromstring(junit.render_junit(reports.whole()))  # noqa: S314 - our own
    assert [suite.get("name") for suite in root] == ["stages", "gates on balls"]
    (inconclusive,) = root.findall("testsuite/testcase[@name='prompt']/skipped")
    assert inconclusive.get("message") == "inconclusive: the server shows no token ids"
    failures = {
        case.get("name"): case.find("failure") for case in root.iter("testcase") if case.find("failure") is not None
    }
    assert failures["log-odds, RMSE ≤ 0.03"].get("message") == "0.0353 is above 0.03"
    assert "far (broken): Too far. qtool x" in failures["weights"].text
    assert root.find("testsuite/properties/property[@name='verdict']").get("value") == "fail"


@pytest.fixture(scope="module")
def validator():
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:qtool:report:{SCHEMA_VERSION}"
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", reports.ALL)
def test_every_report_keeps_the_published_schema_and_lacks_no_field(name, validator):
    written = json.loads(reports.ALL[name]().to_json())
    validator.validate(written)
    for key in written:
        (error,) = validator.iter_errors({other: value for other, value in written.items() if other != key})
        assert error.message == f"'{key}' is a required property"


def test_the_schema_refuses_what_is_no_report(validator):
    written = json.loads(reports.whole().to_json())
    for path, value in (("verdict", "maybe"), ("schema_version", 1), ("stages", {}), ("seconds", "long")):
        assert not validator.is_valid({**written, path: value})


def test_why_says_once_what_holds_of_several_panels():
    whole = reports.whole()
    failed = whole.gates[0]
    gates = (failed, replace(failed, panel="cubes"), replace(failed, panel="rings", reason="1 is above 0.03"))
    about = [each.about for each in words.concerns(replace(whole, gates=gates, stages=()))]
    assert about == ["log-odds, RMSE on balls and cubes", "log-odds, RMSE on rings"]


@pytest.mark.parametrize("name", reports.ALL)
def test_all_forms_are_written_whole(name, tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        paths = write_reports(reports.ALL[name](), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]
    assert all(path.read_text(encoding="utf-8") for path in paths)
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["schema_version"] == SCHEMA_VERSION


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"file cannot be written: File exists"):
        write_reports(reports.whole(), tmp_path / "file")
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
