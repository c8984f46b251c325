"""`python -m tests.pythons`: the base install by every Python of this machine that qtool supports.

The wheel is built once. For each Python it is installed into a new environment with its dependencies alone, and the jobs
of `jobs.py` run there, away from the checkout. For the oldest Python this is done once more with every dependency at the
floor that pyproject.toml names. Names of versions, such as `3.12`, choose among the Pythons.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.pythons.jobs import ENVIRONMENT, JOBS

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SUPPORTED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
ABSENT = ("torch", "transformers", "modelopt", "datasets", "xllamacpp", "av")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(SUPPORTED)} (default: all here)")
    wanted = parser.parse_args().versions or SUPPORTED
    found = {version: python for version in wanted if (python := find_python(version))}
    for version in wanted:
        if version not in found:
            print(f"Python {version}: not on this machine")
    with tempfile.TemporaryDirectory(prefix="qtool-pythons-") as scratch:
        folder = Path(scratch)
        wheel = build_wheel(folder)
        floors = folder / "floors.txt"
        floors.write_text("\n".join(base_floors()))
        runs: list[tuple[str, Path, Sequence[str]]] = [(version, python, ()) for version, python in found.items()]
        for version, python in list(found.items())[:1]:
            runs.append((f"{version} with the floors", python, ("-c", str(floors))))
        failed = sum(not passes(name, python, wheel, pins, folder / name) for name, python, pins in runs)
    print(f"{len(runs) - failed} passed, {failed} failed")
    return 1 if failed or not runs else 0


def find_python(version: str) -> Path | None:
    """An interpreter of that version: from PATH, else one that pyenv has, whose shims answer for the chosen version only."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(
        pyenv.glob(f"{version}.*/bin/python"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.parts[-3])]
    )
    for python in filter(None, [shutil.which(f"python{version}"), *map(str, reversed(installed))]):
        asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split(maxsplit=1)
        if answer[:1] == [version]:
            return Path(answer[1].strip())
    return None


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def base_floors() -> Iterator[str]:
    """Each base dependency at the oldest release that pyproject.toml admits."""
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    for name, floor in re.findall(r'^\s*"([\w-]+)>=([\d.]+)', block, re.MULTILINE):
        yield f"{name}=={floor}"


def passes(name: str, python: Path, wheel: Path, pins: Sequence[str], folder: Path) -> bool:
    """Install into a new environment and run every job; prints a line, and one more for each job that fails."""
    started = time.monotonic()
    folder.mkdir()
    subprocess.run([str(python), "-m", "venv", str(folder / "env")], check=True)
    fresh = folder / "env" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ENVIRONMENT
    pip = [
        str(fresh),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
        *pins,
        str(wheel),
    ]
    installed = subprocess.run(pip, env=environment, capture_output=True, text=True, check=False)
    problems = [line for line in installed.stderr.splitlines() if "ERROR" in line] if installed.returncode else []
    seconds = time.monotonic() - started
    if not problems:
        problems = list(run_jobs(fresh, folder / "work", environment))
    total = time.monotonic() - started
    print(
        f"Python {name}: {'failed' if problems else 'ok'}, {seconds:.0f} s to install and {total - seconds:.0f} s to run"
    )
    for problem in problems:
        print(f"  {problem}")
    sys.stdout.flush()
    return not problems


def run_jobs(python: Path, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    folder.mkdir()
    environment = environment | {"QTOOL_CACHE": str(folder / "cache")}
    probe = f"from importlib.util import find_spec; print([m for m in {ABSENT} if find_spec(m)])"
    present = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    if present != "[]":
        yield f"the base install brings {present}"
    for job in JOBS:
        command = [str(python), "-m", "qtool", *job.arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if problem := job.problem(done.returncode, done.stderr):
            yield f"qtool {' '.join(job.arguments)}: {problem}"


if __name__ == "__main__":
    raise SystemExit(main())
