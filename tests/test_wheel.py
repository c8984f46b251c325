"""The built wheel works by itself, data included."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from qtool import resources

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
    command = [str(python), "-m", "qtool", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_recipes_panels_and_demo_models(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("recipes", "calibration"):
        for path in resources.path(folder).rglob("*"):
            if path.is_file():
                assert f"qtool/_data/{path.relative_to(ROOT).as_posix()}" in names
    for model in resources.demo_models():
        assert f"qtool/demo/models/{model}/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or name.endswith(".pyc")]


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
