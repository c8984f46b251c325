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

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome
from qtool.errors import SetupError
from qtool.progress import duration
from qtool.reporting import console, junit, markdown, words
from qtool.reporting.html import render_html
from qtool.reporting.write import report_schema, write_reports
from qtool.verify.gates import Verdict
from qtool.verify.meanings import meaning
from qtool.verify.metrics import METRICS, Interval
from qtool.verify.report import SCHEMA_VERSION
from tests.reporting import reports


def shown(report, tmp_path, width=80):
    with (tmp_path / "out").open("w", encoding="utf-8", errors="replace") as file:
        screen = Console(width=width, record=True, file=file)
        screen.print(console.render_console(report), crop=False)
    return screen.export_text()


def test_the_console_shows_stages_a_block_for_each_panel_and_last_the_verdict(tmp_path):
    text = shown(reports.whole(), tmp_path)
    for phrase in ("structure", "broken far: Too far.", "remedy: qtool x", "balls: 4 queries, 3 pairs", "≤ 0.03",
                   "Worst pairs of balls", "+3.250 -> +3.000 (Δ -0.2500, label 2)", "Weights: 4.00 GB before, 1.50 GB after (38%)."):  # fmt: skip
        assert phrase in text
    assert text.strip().endswith("FAIL: weights failed; 1 of 2 gates failed on 3 pairs, 1 skipped.")


def test_the_gated_metrics_come_first_and_no_number_is_cut_at_80_columns(tmp_path):
    metrics = dict.fromkeys(METRICS[Task.EMBED], -0.00012)
    ends = {name: Interval(-0.000412345, -0.00012) for name in metrics}
    gated = ("similarity_spearman_mrl2048", "cosine_p1")
    gates = [
        reports.gate(name, Outcome.INCONCLUSIVE, "why", value=-0.00012, interval=ends[name], min=0.99) for name in gated
    ]
    panel = reports.panel(metrics=metrics, intervals=ends)
    report = replace(reports.whole(), task="embed", panels=(panel,), gates=tuple(gates))
    lines = shown(report, tmp_path).splitlines()
    rows = [line for line in lines if re.search(r"\[-4\.1e-04, -1\.2e-04\]", line)]
    names = [row.split()[0] for row in rows]
    assert names[:2] == list(gated)
    assert len(names) == len([name for name in metrics if "_mrl" not in name]) + 1
    assert all(re.search(r"-1\.2e-04  \[-4\.1e-04, -1\.2e-04\]", row) for row in rows)
    assert all(row.endswith("≥ 0.99    inconclusive") for row in rows[:2])
    assert all(len(line) <= 80 for line in lines if "_mrl" not in line)
    assert lines.count("      why") == 1  # once for gates in a row
    assert "metrics of shortened vectors are in report.json" in "\n".join(lines)


def test_metrics_of_another_task_have_no_line(tmp_path):
    assert "cosine_p1" not in shown(reports.whole(), tmp_path)


def test_a_finding_that_sums_a_stage_up_is_said_once(tmp_path):
    stage = reports.whole().stages[-1]
    text = shown(replace(reports.whole(), stages=(replace(stage, summary="Too far. And 1 more."),)), tmp_path)
    assert text.count("Too far.") == 1


@pytest.mark.parametrize("name", reports.ALL)
def test_the_console_obeys_no_stranger(name, tmp_path):
    text = shown(reports.ALL[name](), tmp_path)
    assert "\x1b" not in text
    assert "\x00" not in text


def test_metrics_and_stages_have_the_same_name_in_every_form(tmp_path):
    whole = reports.whole()
    whole = replace(whole, gates=whole.gates[:2])
    page = re.sub(r"\s+", " ", render_html(whole))
    people = {"console": shown(whole, tmp_path), "Markdown": markdown.render_markdown(whole), "HTML": page}
    written = json.loads(whole.to_json())
    assert [stage["name"] for stage in written["stages"]] == [stage.name for stage in whole.stages]
    assert {gate["metric"] for gate in written["gates"]} <= written["panels"][0]["metrics"].keys()
    for form, text in {**people, "JUnit": junit.render_junit(whole)}.items():
        for name in (*(stage.name for stage in whole.stages), *(gate.metric for gate in whole.gates)):
            assert name in text, (form, name)
    for form, text in people.items():
        for heading in ("Stages", "Metrics and gates of the recipe tiny"):
            assert heading in text, (form, heading)


def test_a_pass_without_scores_says_in_every_form_what_passed(tmp_path):
    report = reports.structure_only()
    assert "PASS (structure only): structure passed; nothing was scored." in shown(report, tmp_path)
    assert markdown.render_markdown(report).startswith("# ✅ PASS (structure only): model-NVFP4\n")
    assert "<title>Pass (structure only): model-NVFP4</title>" in render_html(report)
    two = replace(report, stages=(*report.stages, replace(report.stages[0], name="weights")))
    assert words.verdict_title(two) == "Pass (structure and weights only)"
    assert words.verdict_title(replace(reports.whole(), verdict=Verdict.PASS)) == "Pass"


def test_when_and_how_it_ran_is_in_every_form_for_people():
    for text in (markdown.render_markdown(reports.whole()), render_html(reports.whole())):
        for phrase in ("2026-11-24 12:00:00 UTC", "qtool verify out/model-NVFP4 --reference org/model", "torch 2.13.0",
                       "4.00 GB before, 1.50 GB after (38%)", "reference: 1 computed, 2 from the cache or an earlier run"):  # fmt: skip
            assert phrase in text


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
    assert words.interval(Interval(-1, 2)) == "[-1.0000, 2.0000]"
    assert [duration(s) for s in (0.25, 119.9, 600, 8000)] == ["0.2 s", "119.9 s", "10 min", "2 h 13 min"]


def test_every_metric_has_a_meaning():
    assert [metric for names in METRICS.values() for metric in names if not meaning(metric)] == []
    assert meaning("cosine_min_mrl64").endswith("minimum, of vectors cut to 64 dimensions")
    assert meaning("a_metric_of_tomorrow") == ""


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
    for phrase in (
        "| 0.0353 | [0.0312, 0.0399] | ≤ 0.03 |",
        "which ball?",
        "| b.safetensors | differs |",
        "median 0.0100",
    ):
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
    assert failures["log_odds_rmse ≤ 0.03"].get("message") == "0.0353 is above 0.03"
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
    assert about == ["log_odds_rmse on balls and cubes", "log_odds_rmse on rings"]


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
