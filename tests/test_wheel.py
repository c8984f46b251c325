"""The built wheel works by itself, data included."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import qtool
from qtool import resources
from qtool.extras import DISTRIBUTION, EXTRAS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment with the wheel alone; the dependencies are lent to it from this one, the checkout is not."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    executable = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return executable


def run(python, *arguments, cwd):
    """The program that pip made, as a user runs it."""
    command = [str(python.with_name("qtool")), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}


def test_the_wheel_carries_the_package_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    data = {f"qtool/_data/{name}" for folder in ("recipes", "calibration") for name in files_of(folder)}
    package = {name for name in files_of("qtool") if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == package | data
    assert "qtool/py.typed" in names
    for model in resources.demo_models():
        assert f"qtool/demo/models/{model}/model.safetensors" in names
    assert not [name for name in names if re.search(r"train|lessons|courses|tests/|tools/|docs/|\.pyc$", name)]


def test_its_metadata_are_the_readmes_the_classifiers_and_the_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == (DISTRIBUTION, qtool.__version__)
    assert set(metadata.get_all("Provides-Extra")) == {*EXTRAS, "all", "dev"}
    base = {re.match(r"[\w.-]+", each)[0] for each in metadata.get_all("Requires-Dist") if "extra ==" not in each}
    assert not base & {package for extra in EXTRAS.values() for package in extra.packages.values()}
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    readme = set(re.findall(r"^\| `(\w+)` \| [a-z]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert readme == {*EXTRAS, "all"}, "the table of extras under Install"


def test_the_installed_package_is_not_the_checkout(python, tmp_path):
    command = [str(python), "-c", "import qtool; print(qtool.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert not Path(found).is_relative_to(ROOT / "qtool")


def test_it_quantizes_and_verifies_from_anywhere(python, tmp_path):
    assert "nvfp4-w4a16" in run(python, "recipes", cwd=tmp_path)
    run(python, "quantize", "qtool-demo-reranker", "-o", "out", cwd=tmp_path)
    report = json.loads(
        run(
            python,
            "verify",
            "out",
            "--reference",
            "qtool-demo-reranker",
            "--panel",
            "demo-text",
            "--json",
            cwd=tmp_path,
        )
    )
    assert report["verdict"] == "pass"
