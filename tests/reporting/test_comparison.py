"""A comparison as people and programs get it: terminal, page, files, and the command's exit code."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

import qtool
from qtool.cli import app
from qtool.errors import UsageError
from qtool.reporting.comparison import compare, render_console
from qtool.reporting.html import render_comparison
from qtool.reporting.write import write_reports
from qtool.verify import metrics
from qtool.verify.made import Made
from qtool.verify.paired import compare_reports
from tests.reporting import reports
from tests.reporting.test_html import Page
from tests.verify.pairs import embedder, noisy, reranker

PLAIN = Made(recipe="nvfp4-w4a16", algorithm="max")
FITTED = Made(recipe="nvfp4-w4a16-calibrated", algorithm="calibrated", effort="fast", data="general-text", tokens=5731)


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_RESAMPLES", 199)
        yield


@pytest.fixture(scope="module")
def made():
    long = "org/Qwen3-VL-Reranker-2B-with-a-name-of-many-characters-NVFP4-calibrated"
    return replace(reranker("max", noisy(0.2)), made=PLAIN), replace(reranker(long, noisy(0.05, seed=1)), made=FITTED)


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    for name, report in zip(("max", "better"), made, strict=True):
        write_reports(report, root / name)
    return root


def named(*several):
    return compare_reports([(str(number), each) for number, each in enumerate(several)])


def shown(comparison, tmp_path):
    with (tmp_path / "out").open("w", encoding="utf-8", errors="replace") as file:
        screen = Console(width=80, record=True, file=file)
        screen.print(render_console(comparison), crop=False)
    return screen.export_text()


def test_the_console_shows_each_artefact_and_cuts_no_number(made, tmp_path):
    text = shown(named(*made), tmp_path)
    assert "nvfp4-w4a16; 1.50 GB, 6.00 bits per weight; verdict fail" in text
    assert "nvfp4-w4a16-calibrated, effort fast, 5,731 tokens of general-text; 1.50" in text
    assert "1 max, the baseline" in text
    assert re.search(
        r"log_odds_rmse\n +1 max +0\.\d{4}\n +2 …\S+NVFP4-calibrated +0\.\d{4}  -0\.\d{4} \[-0\.\d{4}, -0\.\d{4}\] x0\.\d\d better\n",
        text,
    )
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "One shift of all scores (bias) is another fault" in text.replace("\n", " ")


@pytest.mark.parametrize("pair", ["rerank", "embed", "hostile"])
def test_the_page_is_well_formed_has_every_metric_and_obeys_no_stranger(made, pair, tmp_path):
    both = (embedder("a", 0.1), embedder("b", 0.05)) if pair == "embed" else made
    if pair == "hostile":
        hostile = Made(recipe=reports.HOSTILE, effort=reports.HOSTILE, data=reports.HOSTILE, tokens=1)
        strange = {"made": hostile, "artefact": replace(made[0].artefact, name=reports.HOSTILE)}
        panel = replace(made[0].panels[0], name=reports.HOSTILE)
        both = tuple(replace(each, panels=(panel,), **strange) for each in made)
    comparison = named(*both)
    html = render_comparison(comparison)
    assert Page(html).headings[0] == 1
    assert all(f"<code>{row.metric}</code>" in html for row in comparison.panels[0].metrics)
    assert html.count('<svg viewBox="0 0 360') == 2
    assert "<script" not in html
    assert "\x1b" not in shown(comparison, tmp_path)


def test_files_are_written_whole_and_replaced_with_force_only(folders, tmp_path):
    output = tmp_path / "new" / "out"
    paths = [folders / "max", folders / "better" / "report.json"]
    comparison = compare(paths, output=output)
    assert json.loads((output / "compare.json").read_text()) == json.loads(json.dumps(comparison.to_dict()))
    assert (output / "compare.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UsageError, match="holds a comparison"):
        compare(paths, output=output)
    compare(paths, output=output, force=True)
    (output / "compare.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="was not written by qtool compare"):
        compare(paths, output=output, force=True)
    assert (output / "compare.json").read_text() == '{"mine": 1}'


def test_a_baseline_need_not_stand_first(folders):
    one = compare([folders / "max", folders / "better"], baseline=folders / "better")
    other = compare([folders / "max"], baseline=folders / "better")
    assert [one.artefacts[each.baseline].side.name[:3] for each in (one,)] == ["org"]
    assert other.artefacts[other.baseline].side.name == one.artefacts[one.baseline].side.name


def test_the_exit_code_says_whether_something_is_worse(folders):
    def run(*arguments):
        return CliRunner().invoke(app, ["compare", *map(str, arguments)])

    arguments = [folders / "max", folders / "better", "--fail-if-worse", "log_odds_rmse"]
    assert run(*arguments).exit_code == 0
    worse = run(*arguments, "--baseline", folders / "better")
    assert worse.exit_code == 1
    assert "max is worse than org/" in " ".join(worse.stdout.split())
    assert json.loads(run(*arguments, "--baseline", folders / "better", "--json").stdout)["failures"]
    assert run(folders / "max", folders).exception.exit_code == 2
    assert qtool.compare([folders / "max", folders / "better"], fail_if_worse="kendall_tau").passed


@pytest.mark.parametrize(("content", "message"), [("{}", "it has no list of artefacts"), ('{"artefacts": [{"report": null}]}', "holds no report"), ('{"artefacts": [{"artefact": "a", "report": {}}]}', "is not a report that this version reads")])  # fmt: skip
def test_a_broken_list_of_reports_is_an_error_that_names_it(content, message, tmp_path):
    (tmp_path / "reports.json").write_text(content)
    with pytest.raises(qtool.QtoolError, match=message):
        compare([tmp_path])


def test_a_row_of_the_table_is_an_artefacts_metric_on_a_panel(made):
    rows = named(*made).records()
    first, second = (each for each in rows if each["metric"] == "log_odds_rmse")
    assert (first["difference"], second["outcome"]) == (None, "better")
    assert second["low"] < second["difference"] < second["high"] < 0
