"""The command line as a user meets it: exit codes, streams, JSON, help."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from qtool import resources
from qtool.cli.options import parse_size
from qtool.errors import UsageError
from tests.tiny import text_config, write_checkpoint


def qtool(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "qtool", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model", text_config())


def test_quantize_reports_on_stdout_and_nothing_else_there(model, tmp_path):
    done = qtool("quantize", model, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema_version"] == 1
    assert result["backend"] == "streaming"
    assert "auto" in result["backend_reason"]
    assert (tmp_path / "out" / "qtool.json").is_file()


def test_modelopts_chatter_stays_off_stdout(model, tmp_path):
    done = qtool("quantize", model, "-o", tmp_path / "out", "--backend", "modelopt", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "modelopt"


def test_the_table_names_classes_sizes_and_errors(model, tmp_path):
    done = qtool("quantize", model, "-o", tmp_path / "out")
    assert "*.self_attn.[qkvo]_proj" in done.stdout
    assert "lm_head: vLLM takes the yes/no score rows from it" in done.stdout
    assert "qtool verify" in done.stdout


def test_a_dry_run_needs_no_output_and_writes_none(model, tmp_path):
    done = qtool("quantize", model, "--dry-run", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", "{model}"), 2, "Nowhere to write to"),
        (("quantize", "{model}", "-o", "{model}"), 2, "exists"),
        (("quantize", "{model}", "-o", "{tmp}/x", "--recipe", "nope"), 2, "No recipe is called 'nope'"),
        (("quantize", "{model}", "-o", "{tmp}/x", "--backend", "nope"), 2, "--backend is one of"),
        (("quantize", "{model}", "-o", "{tmp}/x", "--task", "nope"), 2, "--task is rerank or embed"),
        (("quantize", "{model}", "-o", "{tmp}/x", "--max-shard-size", "big"), 2, "'big' is no size"),
        (("quantize", "{model}", "-o", "{tmp}/x", "--nope"), 2, "--nope"),
        (("quantize", "{tmp}", "-o", "{tmp}/x"), 3, "config.json is missing"),
        (("quantize", "/nowhere", "-o", "{tmp}/x"), 2, "no folder here and no repository"),
        (("recipes", "nope"), 2, "Known are nvfp4-w4a16"),
        (("nope",), 2, "No such command"),
    ],
)
def test_exit_codes(arguments, code, message, model, tmp_path):
    done = qtool(*(a.format(model=model, tmp=tmp_path) for a in arguments))
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_shows_only_on_request(tmp_path):
    assert "Traceback" not in qtool("quantize", tmp_path, "--dry-run").stderr
    assert "Traceback" in qtool("quantize", tmp_path, "--dry-run", QTOOL_DEBUG="1").stderr


def test_json_holds_a_path_that_is_no_utf8(model, tmp_path):
    artefact = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(os.fsencode(model), artefact)
    for encoding in ("utf-8:strict", "ascii:strict"):
        done = qtool("inspect", os.fsdecode(artefact), "--json", PYTHONIOENCODING=encoding)
        assert json.loads(done.stdout)["target"] == os.fsdecode(artefact)
        assert (done.returncode, done.stderr) == (1, "")  # a tiny model's tokenizer is no Qwen2's


@pytest.mark.parametrize(
    "address", ["http://localhost:80a", "http://localhost:99999", "http://[::1", "http://a\x01b", "http://\udcff"]
)
def test_an_address_that_is_none_is_a_wrong_command_line(address):
    done = qtool("score", address, "--panel", "demo-text")
    assert done.returncode == 2, done.stderr
    assert "no server's address" in done.stderr


def test_a_shown_recipe_is_the_recipe_and_can_be_used():
    shown = subprocess.run([sys.executable, "-m", "qtool", "recipes", "nvfp4-w4a16"], capture_output=True, check=True)
    assert shown.stdout.rstrip() == resources.path("recipes/nvfp4-w4a16.yaml").read_bytes().rstrip()


def test_a_command_to_copy_is_one_line_however_narrow_the_terminal(tmp_path):
    output = tmp_path / ("long name " * 8) / "m.gguf"
    output.parent.mkdir()
    said = qtool("convert-gguf", "qtool-demo-reranker", "-o", output, "--split-max-size", "2MB", COLUMNS="40").stdout
    command = next(line for line in said.splitlines() if "Next: " in line).partition("Next: qtool ")[2]
    assert qtool(*shlex.split(command)).returncode == 0


def test_recipes_are_listed_and_shown():
    assert "nvfp4-w4a16" in qtool("recipes").stdout
    assert "reason: vLLM takes the yes/no score rows" in qtool("recipes", "nvfp4-w4a16").stdout
    (recipe,) = json.loads(qtool("recipes", "nvfp4-w4a16", "--json").stdout)["recipes"]
    assert recipe["block_size"] == 16


def test_no_colour_codes_reach_a_pipe():
    assert "\x1b" not in qtool("doctor").stdout


def test_help_is_quick():
    """At its best, for a busy machine only ever adds."""
    times = []
    while not times or (min(times) >= 0.3 and len(times) < 20):
        started = time.perf_counter()
        assert qtool("--help").returncode == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


def test_help_imports_nothing_heavy():
    script = "import sys; sys.argv = ['qtool', '--help']; from qtool.cli import app; app(standalone_mode=False);"
    script += "print([m for m in ('torch', 'transformers', 'numpy', 'numba', 'scipy', 'pydantic', 'rich.console') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_streaming_backend_never_imports_torch(model, tmp_path):
    script = "import sys; from pathlib import Path; from qtool.export.quantize import quantize; from qtool.export.quantize import QuantizeOptions;"
    script += "quantize(QuantizeOptions(sys.argv[1], Path(sys.argv[2]))); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, model, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("5 GB", 5 * 10**9), ("1GiB", 1 << 30), ("1.5kb", 1500), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5TB", "GB", "1 2", "1i"])
def test_no_sizes(text):
    with pytest.raises(UsageError):
        parse_size(text)


IMPOSSIBLE = "gates:\n  log_odds_rmse: {max: 0.0}\n"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "out"
    assert qtool("quantize", "qtool-demo-reranker", "-o", out).returncode == 0
    return out


def test_verify_passes_within_the_recipes_gates(artefact):
    done = qtool("verify", artefact, "--reference", "qtool-demo-reranker", "--panel", "demo-text", "--limit", 8)
    assert done.returncode == 0, done.stderr
    assert "nDCG@10, artefact" in done.stdout


def test_verify_fails_with_1_when_a_gate_does(artefact, tmp_path):
    recipe = tmp_path / "strict.yaml"
    text = json.loads((artefact / "qtool.json").read_text())["recipe"]["text"]
    recipe.write_text(text.partition("gates:")[0] + IMPOSSIBLE)
    arguments = (
        "--reference",
        "qtool-demo-reranker",
        "--panel",
        "demo-text",
        "--limit",
        2,
        "--recipe",
        recipe,
        "--json",
    )
    done = qtool("verify", artefact, *arguments)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["verdict"] == "fail"


def test_verify_refuses_an_artefact_of_another_task(artefact):
    done = qtool("verify", artefact, "--reference", "qtool-demo-embedder")
    assert done.returncode == 3
    assert "LogitScore" in done.stderr
