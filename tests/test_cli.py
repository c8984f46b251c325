"""The command line as a user meets it: exit codes, streams, JSON, help."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from qtool import __version__, errors, resources
from qtool.arch.spec import Task
from qtool.cli import app
from qtool.cli.examples import DOCS, EXAMPLES
from qtool.cli.options import at_revision
from qtool.cli.typed import typed_command
from qtool.errors import UsageError
from qtool.options import parse_size
from tests.docs_pages import EXIT_CODES
from tests.tiny import text_config, write_checkpoint

ROOT = Path(__file__).parent.parent


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
        (("quantize", "{model}"), 2, "Missing --output"),
        (("quantize", "{model}", "-o", "{model}"), 2, "exists"),
        (("quantize", "{model}", "-o", "{tmp}/x", "--recipe", "nope"), 2, "No recipe is called 'nope'"),
        (
            ("quantize", "{model}", "-o", "{tmp}/x", "--backend", "nope"),
            2,
            "Invalid value for '--backend': 'nope' is not one of 'auto'",
        ),
        (
            ("quantize", "{model}", "-o", "{tmp}/x", "--task", "nope"),
            2,
            "Invalid value for '--task': 'nope' is not one of 'rerank', 'embed'",
        ),
        (
            ("quantize", "{model}", "-o", "{tmp}/x", "--max-shard-size", "big"),
            2,
            "Invalid size 'big': expected a number with MB",
        ),
        (("quantize", "{model}", "-o", "{tmp}/x", "--nope"), 2, "--nope"),
        (("quantize", "{tmp}", "-o", "{tmp}/x"), 3, "config.json is missing"),
        (("quantize", "/nowhere", "-o", "{tmp}/x"), 2, "Not a local folder or a Hub repository"),
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
    assert "Invalid server address" in done.stderr


def test_a_shown_recipe_is_the_recipe_and_can_be_used():
    shown = subprocess.run([sys.executable, "-m", "qtool", "recipes", "nvfp4-w4a16"], capture_output=True, check=True)
    assert shown.stdout.rstrip() == resources.path("recipes/nvfp4-w4a16.yaml").read_bytes().rstrip()


def test_a_command_to_copy_is_one_line_however_narrow_the_terminal(tmp_path):
    output = tmp_path / ("long name " * 8) / "m.gguf"
    output.parent.mkdir()
    said = qtool("convert-gguf", "qtool-demo-reranker", "-o", output, "--split-max-size", "2MB", COLUMNS="40").stdout
    command = next(line for line in said.splitlines() if "Next: " in line).partition("Next: qtool ")[2]
    assert command.endswith(" --reference qtool-demo-reranker --panel YOUR.jsonl")
    words = shlex.split(command.replace("YOUR.jsonl", "demo-text"))
    assert qtool(*words, "--structure-only").returncode == 0


def test_recipes_are_listed_and_shown():
    assert "nvfp4-w4a16" in qtool("recipes").stdout
    assert "reason: vLLM takes the yes/no score rows" in qtool("recipes", "nvfp4-w4a16").stdout
    (recipe,) = json.loads(qtool("recipes", "nvfp4-w4a16", "--json").stdout)["recipes"]
    assert recipe["block_size"] == 16


def test_no_colour_codes_reach_a_pipe():
    assert "\x1b" not in qtool("doctor").stdout


def test_help_is_quick():
    """In processor seconds, at its best: other work on the machine only ever adds."""
    times = []
    while not times or (min(times) >= 0.3 and len(times) < 20):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert qtool("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_help_imports_nothing_heavy():
    script = "import sys; sys.argv = ['qtool', '--help']; from qtool.cli import app; app(standalone_mode=False);"
    script += "print([m for m in ('torch', 'transformers', 'numpy', 'numba', 'scipy', 'pydantic', 'rich.console') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_streaming_backend_never_imports_torch(model, tmp_path):
    script = "import sys; from pathlib import Path; from qtool.export.quantize import quantize; from qtool.export.quantize import QuantizeOptions;"
    script += "quantize(QuantizeOptions(model=sys.argv[1], output=Path(sys.argv[2]))); print('torch' in sys.modules)"
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


def test_verify_of_a_good_artefact_on_few_queries_is_neither_a_pass_nor_a_fail(artefact):
    done = qtool("verify", artefact, "--reference", "qtool-demo-reranker", "--panel", "demo-text", "--limit", 8)
    assert done.returncode == 6, done.stderr
    assert "ndcg10_artefact" in done.stdout


def test_quantize_ends_with_the_whole_command_that_verifies_at_the_revision_of_its_source(tmp_path):
    source = shutil.copytree(resources.demo_model("qtool-demo-reranker"), tmp_path / "my model")
    done = qtool("quantize", source, "-o", tmp_path / "out")
    command = f"qtool verify {tmp_path / 'out'} --reference '{source}' --panel YOUR.jsonl"
    assert done.stdout.splitlines()[-1] == f"Wrote {tmp_path / 'out'}. Next: {command}"
    assert at_revision("org/name", "v1") == at_revision("hf://org/name", "v1") == "hf://org/name@v1"
    assert at_revision("org/name", None) == "org/name"


def test_the_report_has_the_command_as_it_was_typed_without_its_secrets():
    typed = [
        "verify",
        "http://me:pass@host/x?key=1",
        "--reference",
        "a b",
        "--token",
        "s3cret",
        "--token=s3cret",
        "hf_abcdefgh12",
    ]
    shown = typed_command([*typed, "the-api-key"], {"QTOOL_API_KEY": "the-api-key", "HF_TOKEN": "x"})
    assert shown == (
        "qtool verify 'http://[redacted]@host/x?[redacted]' --reference 'a b' --token '[redacted]' '--token=[redacted]' "
        "'[redacted]' '[redacted]'"
    )


def test_verify_writes_its_command_and_a_line_for_each_stage_where_there_is_no_terminal(artefact, tmp_path):
    arguments = (
        artefact,
        "--reference",
        "qtool-demo-reranker",
        "--panel",
        "demo-text",
        "--limit",
        2,
        "-o",
        tmp_path / "r",
    )
    done = qtool("verify", *arguments, "--token", "hf_secretsecret", COLUMNS="80")
    lines = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert lines == ["structure", "prompt", "noise", "scores", "ranking"]
    assert done.stdout.splitlines()[-1] == f"Report: {tmp_path / 'r' / 'report.html'}"
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["command"].startswith(f"qtool verify {artefact} --reference qtool-demo-reranker")
    for name in ("report.json", "report.html", "report.md"):
        assert "secretsecret" not in (tmp_path / "r" / name).read_text()


def test_an_undecided_inspection_fails_only_when_it_is_strict(tmp_path):
    source = shutil.copytree(resources.demo_model("qtool-demo-reranker"), tmp_path / "m")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (source / name).unlink()
    shutil.rmtree(source / "1_LogitScore")
    done = qtool("inspect", source)
    assert (done.returncode, "UNDECIDED" in done.stdout) == (0, True)
    assert qtool("inspect", source, "--strict").returncode == 1
    assert json.loads(qtool("inspect", source, "--strict", "--json").stdout)["undecided"] is True
    assert qtool("inspect", source, "--strict", "--task", "rerank").returncode == 0


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


def test_another_task_than_the_references_is_a_verdict_of_fail(artefact):
    done = qtool("verify", artefact, "--reference", "qtool-demo-embedder")
    assert done.returncode == 1
    assert "other-task" in done.stdout
    assert "LogitScore" in done.stdout


# The options of all commands.


def test_choices_are_those_of_the_library():
    """Written twice, since --help must not import what knows them."""
    from qtool.cli import options
    from qtool.export.gguf_metadata import PROMPTS
    from qtool.export.gguf_plan import OUTTYPES, PROJECTOR_TYPES
    from qtool.export.quantize import BACKENDS
    from qtool.scoring.http.detect import ServerKind
    from qtool.scoring.transformers.runtime import DTYPES
    from qtool.serve_command import ServingEngine

    for choices, known in (
        (get_args(options.BackendChoice), BACKENDS),
        (get_args(options.DtypeChoice), DTYPES),
        (get_args(options.EngineChoice), (kind.value for kind in ServerKind)),
        (get_args(options.ServingChoice), (engine.value for engine in ServingEngine)),
        (get_args(options.TaskChoice), (task.value for task in Task)),
        (get_args(options.PromptChoice), PROMPTS),
        (get_args(options.ProjectorChoice), PROJECTOR_TYPES),
        (options.OUTTYPES, OUTTYPES),
    ):
        assert set(choices) == set(known)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            "quantize",
            ["--task <rerank|embed>", "<auto|streaming|modelopt>", "Built-in recipe (nvfp4-w4a16, nvfp4-w4a16-4over6,"],
        ),
        ("convert-gguf", ["auto, f32, f16, bf16, q8_0, nvfp4, q6_k, q5_k_m, q4_k_m", "<official|llamacpp>"]),
        ("score", ["<vllm|llama-server|tei|jina>", "<float32|bfloat16|float16>", "auto|cpu|cuda[:N]|mps"]),
        ("serve-command", ["<vllm|llama-server|sglang>"]),
    ],
)
def test_help_shows_choices(command, shown):
    text = qtool(command, "--help").stdout
    assert all(choice in " ".join(text.split()) for choice in shown)


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples_that_can_be_parsed_and_pages_that_exist(command):
    group = get_command(app)
    parent = group.make_context("qtool", [command])
    lines = [line.split() for line in EXAMPLES[command].strip().splitlines()]
    for program, name, *arguments in lines:
        assert (program, name) == ("qtool", command)
        before, *_ = " ".join(arguments).split(" > ")
        group.commands[command].make_context(name, shlex.split(before), parent=parent)
    shown = qtool(command, "--help").stdout
    assert all(" ".join(line) in shown for line in lines)
    pages = DOCS[command].split(", ")
    assert f"Docs: {DOCS[command]}" in shown
    assert all((ROOT / page).is_file() for page in pages)


def test_every_command_has_examples():
    assert list(EXAMPLES) == list(DOCS) == [command.name for command in app.registered_commands]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("qtool ser", {"serve-command"}),
        ("qtool quantize --backend ", {"auto", "streaming", "modelopt"}),
        ("qtool quantize --recipe nvfp4-w4a16-c", {"nvfp4-w4a16-calibrated"}),
        ("qtool quantize qtool-demo-r", {"qtool-demo-reranker"}),
        ("qtool convert-gguf --outtype q8_0,q4", {"q8_0,q4_k_m"}),
        ("qtool score --engine llama", {"llama-server"}),
        ("qtool score --device c", {"cpu", "cuda", "cuda:1"}),
        ("qtool verify --panel demo-t", {"demo-text"}),
        ("qtool verify --task ", {"rerank", "embed"}),
        ("qtool embed --dtype b", {"bfloat16"}),
        ("qtool embed --family ", {"qwen3", "qwen3_vl"}),
    ],
)
def test_completion_knows_commands_choices_and_what_comes_with_qtool(words, expected):
    environment = {"_QTOOL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert set(qtool(**environment).stdout.split()) == expected


@pytest.mark.parametrize(
    "arguments", [("-q", "inspect", "{model}"), ("inspect", "{model}", "--quiet"), ("inspect", "-q", "{model}")]
)
def test_quiet_may_stand_before_and_after_the_command(arguments, model):
    done = qtool(*(word.format(model=model) for word in arguments))
    assert (done.returncode, done.stderr) == (1, "")
    assert "BROKEN" in done.stdout


def test_quiet_shows_errors_and_not_notes(artefact):
    arguments = ("serve-command", artefact, "--engine", "sglang")
    noted, quiet = qtool(*arguments), qtool(*arguments, "-q")
    assert "SGLang ranks" in noted.stderr
    assert (quiet.stdout, quiet.stderr) == (noted.stdout, "")
    assert "error: " in qtool("inspect", "no-such-model", "-q").stderr


def test_verbose_shows_tracebacks_and_excludes_quiet(tmp_path):
    assert "Traceback" in qtool("quantize", tmp_path, "--dry-run", "-v").stderr
    both = qtool("-q", "quantize", tmp_path, "--dry-run", "-v")
    assert (both.returncode, both.stderr) == (2, "error: --quiet cannot be combined with --verbose.\n")


def test_version_and_with_verbose_those_of_libraries():
    assert qtool("--version").stdout == f"{__version__}\n"
    for arguments in (("--version", "-v"), ("-v", "--version")):
        first, *others = qtool(*arguments).stdout.splitlines()
        assert first == __version__
        assert {line.split()[0] for line in others} > {"python", "numpy", "torch", "transformers", "xllamacpp"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", "{tmp}/none", "-o", "{tmp}/x", "--json"), 2, "{tmp}/none"),
        (("quantize", "{tmp}", "--dry-run", "--json"), 3, "config.json is missing"),
        (("quantize", "--json"), 2, "Missing argument 'MODEL'"),
        (("inspect", "x", "--json", "--nope"), 2, "No such option: --nope"),
        (("embed", "x", "-o", "{tmp}/v.npy", "--dtype", "int4", "--panel", "demo-text", "--json"), 2, "'int4' is not"),
        (("score", "x", "--panel", "demo-text", "--device", "gpu", "--json"), 2, "Invalid --device 'gpu'"),
        (("convert-gguf", "qtool-demo-reranker", "--outtype", "q9", "--dry-run", "--json"), 2, "'q9'"),
        (("recipes", "nope", "--json"), 2, "'nope'"),
    ],
)
def test_an_error_is_json_too_where_json_is_wanted(arguments, code, message, tmp_path):
    done = qtool(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == code, done.stderr
    written = json.loads(done.stdout)
    assert written["schema_version"] == 1
    assert written["error"]["code"] == code
    assert message.format(tmp=tmp_path) in written["error"]["message"]
    assert set(written["error"]) == {"code", "message", "hint"}
    assert f"error: {written['error']['message']}" in done.stderr


def test_the_documented_exit_codes_are_all():
    assert set(EXIT_CODES) == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_without_a_command_the_help_is_shown_and_nothing_done():
    done = qtool()
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: qtool [OPTIONS] COMMAND" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "m"), "Missing --panel."),
        (
            ("score", "m", "--panel", "a", "--dataset", "d", "--columns", "c"),
            "--panel cannot be combined with --dataset.",
        ),
        (("score", "m", "--dataset", "d"), "--dataset and --columns must be given together."),
        (("verify", "m", "--reference", "r", "--columns", "c"), "--dataset and --columns must be given together."),
        (("embed", "m", "-o", "v", "--texts", "t", "--panel", "p"), "--texts cannot be combined with --panel."),
        (("embed", "m", "-o", "v", "--texts", "t", "--shard", "1/2"), "--texts cannot be combined with --shard."),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    done = qtool(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_verify_says_where_its_report_is(artefact, tmp_path):
    where = tmp_path / "report"
    done = qtool("verify", artefact, "--reference", "qtool-demo-reranker", "--structure-only", "-o", where)
    assert f"Report: {where / 'report.html'}" in done.stdout.splitlines()
    assert (where / "report.html").is_file()
