"""The public API as Python code meets it: names, arguments, results, progress, and the page that describes it."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest

import qtool
from qtool import (
    ConvertOptions,
    EmbedOptions,
    PanelChoice,
    QuantizeOptions,
    RepairOptions,
    RuntimeOptions,
    ScoreOptions,
    SetupError,
    Task,
    UsageError,
    VerifyOptions,
    api,
    console,
)
from qtool.cli import app
from qtool.options import coerce, parse_size
from qtool.results import Result
from tests.tiny import text_config, write_checkpoint

ROOT = Path(__file__).parent.parent
NAMES = [name for name in qtool.__all__ if name != "__version__"]
RUNTIME = {field.name for field in fields(RuntimeOptions)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("api") / "model", text_config())


# Names.


def test_dir_lists_the_public_names_and_all_of_them_exist():
    assert dir(qtool) == sorted(qtool.__all__)
    assert all(getattr(qtool, name) is not None for name in NAMES)
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", qtool.__version__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qtool.quantise  # noqa: B018


def test_type_checkers_see_the_names_that_exist():
    tree = ast.parse((ROOT / "qtool" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {a.asname: node.module for node in block.body if node.module.startswith("qtool") for a in node.names}
    assert seen == qtool._HOMES


def test_importing_qtool_imports_nothing_else():
    script = "import sys, qtool; print([name for name in sys.modules if name.startswith(('qtool.', 'numpy', 'rich'))])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_verify_stays_a_function_whatever_was_imported():
    """Its name is a sub-package's, too."""
    script = "import qtool, qtool.verify.run, inspect; from qtool import verify; first = qtool.verify\n"
    script += "assert callable(first) and callable(verify) and callable(qtool.verify)\n"
    script += "assert 'reference' in inspect.signature(qtool.verify).parameters\n"
    script += "try: qtool.verify('x', reference=3)\nexcept qtool.UsageError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Invalid reference 3: expected text or a path."


# One set of keywords: of the functions, of the options, of the command line.


def parameters(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@pytest.mark.parametrize(
    ("function", "kind", "renamed"),
    [
        (api.quantize, QuantizeOptions, {"max_shard_size": "max_shard_bytes"}),
        (api.convert_gguf, ConvertOptions, {"split_max_size": "split_max_bytes"}),
        (api.repair_gguf, RepairOptions, {}),
        (api.verify, VerifyOptions, {}),
        (api.open_runtime, RuntimeOptions, {}),
    ],
)
def test_the_keywords_are_the_fields_of_the_options(function, kind, renamed):
    others = {"progress", "dataset", "columns"} if kind in (VerifyOptions, QuantizeOptions) else {"progress"}
    others |= {"target", "options"} if kind is RuntimeOptions else set()
    keywords = {renamed.get(name, name): value for name, value in parameters(function).items() if name not in others}
    assert set(keywords) == {field.name for field in fields(kind)}
    for field in fields(kind):
        if field.default is not MISSING and field.name != "llama_cpp":
            value = keywords[field.name]
            assert (parse_size(value) if field.name == "max_shard_bytes" else value) == field.default, field.name


@pytest.mark.parametrize(("function", "kind"), [(api.score, ScoreOptions), (api.embed, EmbedOptions)])
def test_the_keywords_of_score_and_embed_are_flat(function, kind):
    chosen = {field.name for field in fields(PanelChoice)} - {"source"}
    own = {field.name for field in fields(kind)} - {"runtime", "source"}
    texts = {"texts"} if kind is EmbedOptions else set()
    assert set(parameters(function)) == own | RUNTIME | chosen | texts | {"panel", "dataset", "columns", "progress"}


OWN_OF_COMMANDS = {"json", "strict", "dry_run"}


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.name)
def test_the_options_of_a_command_are_keywords_of_its_function(command):
    function = getattr(api, command.name.replace("-", "_"), None)
    if function is None:
        assert command.name in ("serve-command", "demo", "recipes", "doctor")
        return
    renamed = {
        "outtype": "outtypes",
        "tensor_type": "tensor_types",
        "panel": "panels" if command.name == "verify" else "panel",
        "cache": "use_cache",
    }
    keywords = parameters(function)
    for name, default in parameters(command.callback).items():
        keyword = renamed.get(name, name)
        if keyword not in OWN_OF_COMMANDS:
            assert keyword in keywords
            assert default in (keywords[keyword], None, inspect.Parameter.empty), name


# Arguments.


def test_options_take_what_a_person_would_pass(tmp_path):
    options = VerifyOptions(
        artefact=tmp_path, reference=Path("org/model"), panels="demo-text", task="embed", shard="2/3", output="report"
    )
    assert (options.artefact, options.reference) == (str(tmp_path), "org/model")
    assert options.panels == ("demo-text",)
    assert options.task is Task.EMBED
    assert (options.shard.index, options.shard.count) == (2, 3)
    assert options.output == Path("report")
    assert RuntimeOptions(timeout=3, concurrency=np.int64(2)).timeout == 3.0
    assert ConvertOptions(model="m", outtypes=["f16", "q8_0"]).outtypes == ("f16", "q8_0")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: qtool.quantize(3), "Invalid model 3: expected text or a path."),
        (lambda: qtool.quantize("m", output=b"x"), "Invalid output b'x': expected a path."),
        (lambda: qtool.quantize("m", output=""), "Invalid output '': expected a path."),
        (lambda: qtool.quantize("m", task="nope"), "Invalid task 'nope': expected rerank or embed."),
        (lambda: qtool.quantize("m", backend="x"), "Invalid backend 'x': expected auto, streaming or modelopt."),
        (lambda: qtool.quantize("m", max_shard_size="5x"), "Invalid size '5x': expected a number with MB, MiB, GB"),
        (lambda: qtool.quantize("m", force="yes"), "Invalid force 'yes': expected True or False."),
        (lambda: qtool.quantize("m", progress=3), "Invalid progress 3: expected a callable, None or 'bar'."),
        (lambda: qtool.convert_gguf("m", outtypes=[1]), "Invalid outtypes 1: expected text or a path."),
        (lambda: qtool.convert_gguf("m", prompt="x"), "Invalid prompt 'x': expected official or llamacpp."),
        (lambda: qtool.repair_gguf("m.gguf"), "Invalid output None: expected a path."),
        (lambda: qtool.inspect(None), "Invalid target None: expected text or a path."),
        (lambda: qtool.inspect("m", task=1), "Invalid task 1: expected rerank or embed."),
        (lambda: qtool.score("m"), "Expected one panel, got none."),
        (lambda: qtool.score("m", panel="demo-text", dataset="d", columns="c"), "Expected one panel, got 2."),
        (lambda: qtool.score("m", dataset="d"), "Arguments dataset and columns must be given together."),
        (lambda: qtool.score("m", panel="demo-text", shard="2"), "'2'"),
        (lambda: qtool.score("m", panel="demo-text", limit=1.5), "Invalid limit 1.5: expected a whole number."),
        (lambda: qtool.embed("m", texts=["a"], limit=1), "Arguments texts and limit cannot be combined."),
        (lambda: qtool.embed("m", texts=["a"], ids="x"), "Argument ids names the rows of an output file"),
        (lambda: qtool.verify("m"), "Invalid reference None: expected text or a path."),
        (lambda: qtool.verify("m", reference="r", shard=2), "Invalid shard 2: expected a PanelShard."),
        (lambda: qtool.merge_reports([3], output="x"), "Invalid folders 3: expected a path."),
        (lambda: qtool.open_runtime(3), "Invalid target 3: expected text or a path."),
        (lambda: qtool.open_runtime("m", timeout="soon"), "Invalid timeout 'soon': expected a number."),
        (lambda: qtool.open_runtime("m", llama_cpp=1), "Invalid llama_cpp 1: expected a LlamaCppOptions."),
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(call, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        call()


def test_a_long_value_is_shown_short():
    with pytest.raises(UsageError) as caught:
        coerce("limit", "x" * 5000, int)
    assert len(caught.value.message) < 200


def test_options_and_keywords_are_not_mixed():
    for call in (
        lambda: qtool.quantize(QuantizeOptions(model="m"), force=True),
        lambda: qtool.quantize(QuantizeOptions(model="m"), max_shard_size="1GB"),
        lambda: qtool.score(ScoreOptions(target="m", panel=PanelChoice("demo-text")), limit=2),
        lambda: qtool.open_runtime("m", RuntimeOptions(), dtype="bfloat16"),
    ):
        with pytest.raises(UsageError, match="cannot be combined with an options object"):
            call()


def test_options_are_keyword_only():
    for kind in (QuantizeOptions, ConvertOptions, RepairOptions, ScoreOptions, EmbedOptions, VerifyOptions):
        with pytest.raises(TypeError, match="positional"):
            kind("x")


# Results.


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    return qtool.quantize(model, output=str(tmp_path_factory.mktemp("made") / "out"))


def test_a_result_is_a_dict_a_frame_and_a_table(made):
    assert json.loads(json.dumps(made.to_dict()))["schema_version"] == 1
    frame = made.to_frame()
    assert list(frame["action"]) == [row.action for row in made.classes]
    assert frame["tensors"].sum() == sum(row.tensors for row in made.classes)
    shown = made._repr_html_()
    assert "<th>relative_error</th>" in shown
    assert f"{made.bits_per_weight:.2f} bits per weight" in shown
    assert repr(made).startswith("<QuantizationSummary: Qwen3ForCausalLM, task unknown")


def test_every_result_of_the_api_is_one():
    results = ("QuantizationSummary", "ConversionSummary", "RepairSummary", "InspectionReport", "Scores", "Embeddings")
    assert all(issubclass(getattr(qtool, name), Result) for name in (*results, "Report"))


def test_a_frame_without_pandas_is_a_setup_error(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SetupError, match="pandas") as caught:
        made.to_frame()
    assert (caught.value.exit_code, caught.value.hint) == (4, "pip install pandas")


class Many(Result):
    headline = "Rows <of> a file."

    def records(self):
        return [{"text": f"<script>{index}", "value": 0.123456, "count": 12345, "none": None} for index in range(30)]

    def to_dict(self):
        return {}


def test_html_is_escaped_and_short():
    shown = Many()._repr_html_()
    assert "<b>Rows &lt;of&gt; a file.</b>" in shown
    assert "&lt;script&gt;19" in shown
    assert "<td>0.1235</td><td>12,345</td><td></td>" in shown
    assert "<script>" not in shown
    assert shown.count("<tr>") == 21
    assert "10 more rows" in shown


def test_an_inspection_lists_its_findings(model):
    report = qtool.inspect(model)
    assert {row["code"] for row in report.records()} == {finding.code for finding in report.findings}
    assert report.broken  # a tiny model's tokenizer is not Qwen's
    assert "BROKEN" in repr(report)


# Progress.


def test_a_callable_is_called_and_none_is_silent(model, tmp_path, capfd):
    seen = []
    qtool.quantize(model, output=tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]
    stages = []
    qtool.inspect(model, progress=lambda *state: stages.append(state))
    assert {len(state) for state in stages} <= {3}
    qtool.quantize(model, output=tmp_path / "b", progress=None)
    qtool.quantize(model, output=tmp_path / "c")  # no terminal
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", ["", ", progress=None"])
def test_a_terminal_shows_a_bar_by_default(model, tmp_path, progress):
    script = f"import qtool; qtool.quantize({str(model)!r}, output={str(tmp_path / 'out')!r}{progress})"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as running:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # Linux: the other side is closed
            pass
        os.close(ours)
        assert running.stdout.read() == b""
    assert running.returncode == 0
    assert (b"Quantizing" in shown) is (progress == "")


def test_a_log_gets_a_line_for_each_stage_and_in_long_ones(capsys, monkeypatch):
    import time

    monkeypatch.setenv("COLUMNS", "200")
    with console.StageLines(lambda done, total: f"{done} of {total} pairs", every=0.05, least=0.0) as lines:
        lines.update("first", 1, 4)
        time.sleep(0.12)
        lines.update("first", 4, 4)
        lines.update("first", 4, 4)
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"first: 1 of 4 pairs after \d+ s", said[0])
    assert re.fullmatch(r"first: 4 of 4 pairs in 0\.\d s", said[-1])
    assert sum(" in " in line for line in said) == 1


# The page.


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL):
        exec(compile(block, "python.md", "exec"), names)  # noqa: S102 - our own page
    said = capsys.readouterr().out
    assert "pass" in said or "inconclusive" in said
    assert (tmp_path / "report" / "report.html").is_file()
    assert names["embeddings"].vectors.shape == (2, 128)
    assert names["log_odds"][0] > names["log_odds"][1]
    assert "exists" in said
