"""The walks in docs/architecture.md are what runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

QUANTIZE = "qtool.quantize('qtool-demo-reranker', output='made', force=True, progress=None)"
CONVERT = "qtool.convert_gguf('qtool-demo-reranker', output='gguf', outtypes=['q8_0'], force=True, progress=None)"
ONE_PAIR = "panels='demo-text', limit=1, noise_queries=0, use_cache=False, progress=None"
VERIFY = f"{QUANTIZE} if run == 1 else None; qtool.verify('made', reference='qtool-demo-reranker', {ONE_PAIR})"

JOBS = {
    "A weight through `quantize`": (15, QUANTIZE),
    "A tensor through `convert-gguf`": (20, CONVERT),
    "A pair through `verify`": (25, VERIFY),
}
"""Each walk with the number of files that it may name, and the job; what runs the second time is counted."""

TRACE = """
import sys, threading, qtool
files = set()

def note(frame, event, argument):
    if event == "call":
        files.add(frame.f_code.co_filename)

for run in (1, 2):
    if run == 2:
        threading.setprofile(note)
        sys.setprofile(note)
    {job}
sys.setprofile(None)
threading.setprofile(None)
print("\\n".join(files))
"""


def section(title: str) -> str:
    return ARCHITECTURE.split(f"### {title}\n")[1].split("\n#")[0]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_0-9/]+\.py)`", text))


@pytest.mark.parametrize("title", JOBS)
def test_a_walk_names_the_files_that_run(title, tmp_path):
    limit, job = JOBS[title]
    steps, _, aside = section(title).partition("\n\nBe")  # "Beside" or "Before": other things that run on the way
    script = TRACE.format(job=job)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    package = ROOT / "qtool"
    ran = {
        path.relative_to(package).as_posix() for path in map(Path, done.stdout.split("\n")) if package in path.parents
    }
    passed = named(section("Passed by all"))
    assert len(re.findall(r"\b\d+\. `", steps)) <= limit
    assert ran - named(steps) - named(aside) - passed == set()
    assert named(steps) - ran <= {"scoring/remembering.py"}  # without an output folder and cache nothing is kept


@pytest.mark.parametrize("path", sorted(named(ARCHITECTURE)))
def test_every_file_named_is_there(path):
    assert (ROOT / "qtool" / path).is_file() or (ROOT / path).is_file() or (ROOT / "tests" / path).is_file()
