"""Every command where packages are missing: it works, or it exits 4 and names the command that installs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction

import pytest

from qtool.errors import SetupError
from qtool.extras import EXTRAS, import_failure, is_installed, require_extra
from tests.inputs.films import Film
from tests.pythons.jobs import EMBEDDER, RERANKER
from tests.scoring.servers import jina, results, serving
from tests.without import qtool_without

EVERY = {module for extra in EXTRAS.values() for module in extra.packages}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=lambda extra: extra.name)
def test_an_extra_is_refused_package_by_package(extra, monkeypatch):
    require_extra(extra.name, "This")
    for module, package in extra.packages.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(SetupError) as caught:
                require_extra(extra.name, "This", "do without")
        assert caught.value.message == f"This needs {package}, which is not installed."
        assert caught.value.hint == f"Run `pip install 'qtool-retrieval[{extra.name}]'`, or do without."


def test_all_that_is_missing_is_listed_and_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    for module in EXTRAS["modelopt"].packages:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match="needs nvidia-modelopt, torch and transformers, which are not installed"):
        require_extra("modelopt", "This")
    (tmp_path / "a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("a_folder")


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (ModuleNotFoundError("No", name="modelopt.torch"), "nvidia-modelopt is not", "'qtool-retrieval[modelopt]'"),
        (ModuleNotFoundError("No", name="numba"), "numba is not installed", "pip install qtool-retrieval"),
        (ImportError("libx.so: no such file", name="av._core"), "libx.so: no such file", "'qtool-retrieval[video]'"),
        (ModuleNotFoundError("No", name="fcntl"), "Linux and macOS", "WSL"),
    ],
)
def test_an_import_that_fails_names_its_package_and_the_command(error, message, hint):
    failure = import_failure(error)
    assert message in failure.message
    assert hint in failure.hint
    assert failure.exit_code == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands below work on, made by qtool itself."""
    folder = tmp_path_factory.mktemp("extras")
    line = {"query": "a red ball", "documents": ["a ball", "a cube"]}
    (folder / "panel.jsonl").write_text(json.dumps(line))
    film = Film(4, Fraction(2)).write(folder / "film.mov")
    (folder / "films.jsonl").write_text(json.dumps({**line, "documents": [{"video": {"file": film.name}}, "a cube"]}))
    (folder / "rows.jsonl").write_text(json.dumps({"q": "a ball", "p": "a red ball", "n": ["a cube"]}))
    shards = [
        f"verify {RERANKER} --reference {RERANKER} --panel panel2.jsonl --noise-queries 0 --shard {i}/2 -o shard{i}"
        for i in (1, 2)
    ]
    (folder / "panel2.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}")
    gguf = (
        f"convert-gguf {RERANKER} --outtype f16 --mmproj none -o model.gguf",
        f"convert-gguf {EMBEDDER} --outtype f16 --mmproj none -o embedder.gguf",
    )
    base = (f"quantize {RERANKER} -o nvfp4", *gguf)  # what the base install does; `make test-pythons` runs all of it
    for command, hidden in [*((each, EVERY) for each in base), *((each, ()) for each in shards)]:
        done = qtool_without(hidden, *command.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@dataclass(frozen=True)
class Row:
    """A command and the extras that it needs; `{tmp}` is an empty folder, `{server}` a reranker's address.

    A long one runs elsewhere in the tests, and is here refused only.
    """

    line: str
    needs: tuple[str, ...] = ()
    is_long: bool = False

    @property
    def modules(self):
        return {module: name for name in reversed(self.needs) for module in EXTRAS[name].packages}


DATASET = "--dataset rows.jsonl --columns query=q,positive=p,negative=n"
ROWS = (
    Row("merge-reports shard1 shard2 -o {tmp}/merged"),
    Row("score {server} --engine jina --panel panel.jsonl --task rerank"),
    Row(f"score {{server}} --engine jina {DATASET} --task rerank", ("datasets",)),
    Row(f"score {RERANKER} --panel panel.jsonl", ("score",)),
    Row(f"score {RERANKER} --panel films.jsonl", ("score", "video")),
    Row("score model.gguf --panel panel.jsonl", ("llamacpp",)),
    Row(f"embed {EMBEDDER} --panel panel.jsonl -o {{tmp}}/vectors.npy", ("score",)),
    Row("embed embedder.gguf --panel panel.jsonl -o {tmp}/vectors.npy", ("llamacpp",)),
    Row(f"verify nvfp4 --reference {RERANKER} --panel panel.jsonl -o {{tmp}}/report", ("score",)),
    Row(f"verify model.gguf --reference {RERANKER} --panel panel.jsonl", ("score", "llamacpp")),
    Row(f"quantize {RERANKER} -o {{tmp}}/out --backend modelopt", ("modelopt",), is_long=True),
    Row(f"calibrate {EMBEDDER} --data panel.jsonl -o {{tmp}}/stats.gguf", ("score",), is_long=True),
    Row(f"calibrate {EMBEDDER} {DATASET} -o {{tmp}}/stats.gguf", ("score", "datasets"), is_long=True),
    Row("demo -o {tmp}/demo", ("score",), is_long=True),
)


@pytest.fixture
def qtool(folder, tmp_path):
    def run(row, hidden):
        with serving(jina(lambda _, documents: results(*[0.5] * len(documents)))) as server:
            arguments = row.line.format(tmp=tmp_path, server=server.url).split()
            return qtool_without(hidden, *arguments, cwd=folder, QTOOL_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1")

    return run


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_long], ids=lambda row: row.line)
def test_a_command_works_without_the_packages_of_other_extras(row, qtool):
    done = qtool(row, EVERY - set(row.modules))
    assert done.returncode in ((0, 1, 6) if row.line.startswith(("verify", "merge")) else (0,)), done.stderr


@pytest.mark.parametrize(
    ("row", "module"),
    [(row, module) for row in ROWS for module in row.modules],
    ids=lambda value: getattr(value, "line", value),
)
def test_a_missing_package_is_exit_4_with_the_command_that_installs_it(row, module, qtool, tmp_path):
    done = qtool(row, [module])
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ")
    assert f"pip install 'qtool-retrieval[{row.modules[module]}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


LIGHT = (
    "--help",
    "--version",
    "doctor",
    "recipes",
    "recipes nvfp4-w4a16",
    f"inspect {RERANKER}",
    "inspect model.gguf",
    "serve-command nvfp4 --engine vllm",
    "serve-command model.gguf --engine llama-server",
)


@pytest.mark.parametrize("line", LIGHT)
def test_what_compiles_nothing_imports_no_compiler_and_no_extra(line, folder):
    script = "import sys; from qtool.cli import app; app(sys.argv[1:], standalone_mode=False);"
    script += f"print([m for m in {('numba', 'llvmlite', 'scipy', *EVERY)} if m in sys.modules], file=sys.stderr)"
    command = [sys.executable, "-c", script, *line.split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["numba", "llvmlite", "numpy", "gguf", "pydantic", "rich", "typer"])
@pytest.mark.parametrize("line", [f"quantize {RERANKER} -o {{tmp}}/out", "repair-gguf model.gguf -o {tmp}/out.gguf"])
def test_a_missing_dependency_is_exit_4_too(line, module, folder, tmp_path):
    """Or whatever it is otherwise, where the command does without; `model.gguf` needs no repair, which is 2."""
    done = qtool_without([module], *line.format(tmp=tmp_path).split(), cwd=folder)
    assert done.returncode == 4 or (module != "numpy" and done.returncode in (0, 2)), done.stderr
    if done.returncode == 4:
        assert f"The package {module} is not installed." in done.stderr
        assert "pip install qtool-retrieval" in done.stderr
