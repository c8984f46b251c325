"""The GitHub Action: its own shell steps, run as a runner runs them, on a tiny model; and the workflows of docs/ci.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from qtool.extras import EXTRAS
from qtool.reporting.write import report_schema
from tests.docs_pages import COMMANDS, help_of
from tests.scoring import tiny

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step.get("name", step.get("uses")): step for step in ACTION["runs"]["steps"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_vl(tmp_path_factory.mktemp("action") / "a model")


@pytest.fixture
def runner(tmp_path):
    """Runs one step with the action's inputs, as a runner does; gives exit code, outputs and job summary."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, command in (("qtool", f"{sys.executable} -m qtool"), ("python", sys.executable)):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (bin_folder / name).chmod(0o755)

    def run(step, **inputs):
        given = {name: str(about.get("default", "")) for name, about in ACTION["inputs"].items()} | inputs
        names = {f"inputs.{name}": value for name, value in given.items()}
        own = {key: filled(value, names) for key, value in STEPS[step].get("env", {}).items()}
        files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        path = f"{bin_folder}:{os.environ['PATH']}"
        environment = {**os.environ, **own, **{name: str(file) for name, file in files.items()}, "PATH": path}
        environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[step]["run"]]
        done = subprocess.run(shell, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        return done, outputs, files["GITHUB_STEP_SUMMARY"].read_text()

    return run


def filled(value, names):
    return re.sub(r"\$\{\{ (\S+) \}\}", lambda match: names[match[1]], value)


def test_the_action_verifies_in_shards_and_the_documented_command_merges_them(model, runner, tmp_path):
    lines = [{"query": f"which ball {n}?", "documents": ["a red ball", "a cube"]} for n in range(4)]
    (tmp_path / "my balls.jsonl").write_text("\n".join(map(json.dumps, lines)))
    panels = f"{tmp_path}/my balls.jsonl\n"
    for shard in (1, 2):
        arguments = f"--task rerank\n --noise-queries 0 --shard {shard}/2"
        inputs = {"artefact": str(model), "reference": str(model), "panels": panels, "output": f"shards/shard-{shard}"}
        done, outputs, summary = runner("Verify", arguments=arguments, strict="true", **inputs)
        assert done.returncode == 0, done.stderr
        # A share is not judged.
        assert outputs == {"code": "0", "verdict": "ungated"}, done.stderr
        assert summary.startswith("# ⚪ UNGATED: a model")
        names = {path.name for path in (tmp_path / "shards" / f"shard-{shard}").iterdir()}
        assert {"report.json", "report.md", "report.html", "junit.xml"} <= names
    (merge,) = [step["run"] for step in steps_of(workflows()) if "merge-reports" in step.get("run", "")]
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", merge], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    # So few queries never pass a ranking, which --strict turns into an exit code.
    assert done.returncode == 1, done.stderr
    assert "on 8 pairs" in (tmp_path / "report" / "report.md").read_text()
    for folder in (tmp_path / "report", tmp_path / "shards" / "shard-1"):
        jsonschema.validate(json.loads((folder / "report.json").read_text()), report_schema())


def test_without_a_report_the_verdict_is_error_and_the_exit_code_is_kept(model, runner):
    done, outputs, summary = runner(
        "Verify", artefact=str(model), reference=str(model), panels="nope", arguments="--task rerank"
    )
    assert done.returncode == 0
    assert outputs == {"code": "2", "verdict": "error"}
    assert "Unknown panel 'nope'" in done.stderr
    assert summary == ""


def test_inputs_become_arguments_and_never_commands(runner, tmp_path):
    (tmp_path / "bin" / "qtool").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > said\nexit 5\n')
    attack = "$(touch harm); `touch harm` * 'x"
    inputs = {
        "artefact": f"--help {attack}",
        "reference": attack,
        "panels": f"{attack}\nb",
        "arguments": "--limit 5\n* --weights",
    }
    _, outputs, _ = runner("Verify", strict="true", **inputs)
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["verify", "--reference", attack, "--output", "qtool-report", "--panel", attack, "--panel", "b", "--strict",
                    "--limit", "5", "*", "--weights", "--", f"--help {attack}"]  # fmt: skip
    assert outputs == {"code": "5", "verdict": "error"}
    assert not (tmp_path / "harm").exists()


def test_inputs_reach_the_shell_through_the_environment_alone():
    for step in STEPS.values():
        assert "${{" not in step.get("run", "")
    assert all(about.get("description") for about in (*ACTION["inputs"].values(), *ACTION["outputs"].values()))


@pytest.mark.parametrize(
    ("wanted", "installed"),
    [("", "{action}[score,llamacpp,datasets,video]"), ("qtool-retrieval==9", "qtool-retrieval==9")],
)
def test_pip_installs_the_action_itself_with_all_that_a_verification_can_use(
    wanted, installed, runner, tmp_path, monkeypatch
):
    monkeypatch.setenv("GITHUB_ACTION_PATH", "/the action")
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > said\n')
    done, _, _ = runner("Install qtool", qtool=wanted)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said[-2:] == ["/the action/.ci/constraints.txt", installed.format(action="/the action")]
    extras = re.findall(r"\w+", said[-1].partition("[")[2])
    assert set(extras) <= set(EXTRAS)


def test_what_fails_comes_after_what_must_be_kept():
    names = list(STEPS)
    assert names[-1] == "Verdict"
    assert names.index("actions/upload-artifact@v4") < names.index("Verdict")


@pytest.mark.parametrize(("code", "ends_with", "said"), [(0, 0, ""), (1, 1, ""), (3, 3, ""), (6, 0, "::warning::")])
def test_the_job_ends_as_the_verdict_and_an_inconclusive_one_is_a_warning(code, ends_with, said, runner, monkeypatch):
    monkeypatch.setitem(STEPS["Verdict"], "env", {"CODE": str(code)})
    done, _, _ = runner("Verdict")
    assert (done.returncode, done.stdout[: len(said)]) == (ends_with, said)


def workflows():
    text = (ROOT / "docs" / "ci.md").read_text()
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def steps_of(documents):
    return [step for document in documents for job in document["jobs"].values() for step in job["steps"]]


def test_the_documented_workflows_use_inputs_and_options_that_exist():
    steps = steps_of(workflows())
    used = [step for step in steps if "qtool@" in step.get("uses", "")]
    assert len(used) >= 2
    for step in used:
        assert set(step["with"]) <= set(ACTION["inputs"])
        assert {name for name, about in ACTION["inputs"].items() if about.get("required")} <= set(step["with"])
        options = re.findall(r"(?<!\S)--[a-z-]+", step["with"].get("arguments", ""))
        assert set(options) <= set(re.findall(r"--[a-z-]+", help_of("verify")))
    for command, rest in re.findall(r"^\s*qtool (\S+)(.*)$", "\n".join(s.get("run", "") for s in steps), re.MULTILINE):
        assert command in COMMANDS
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)) <= set(re.findall(r"--?[a-z][\w-]*", help_of(command)))
