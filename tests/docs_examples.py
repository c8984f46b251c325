"""The commands in the docs whose output is shown: they run, and `make docs` writes their output again.

A `console` block shows a session: a line that begins with `$ ` is a command, what follows is its output. The commands
of a page run in order in one scratch folder, in which the models that they name are demo models.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.export.test_repair import HEAD, RANKING, rewritten

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COLUMNS = "100"

RERANKER, EMBEDDER = "qtool-demo-reranker", "qtool-demo-embedder"
SESSION = re.compile(r"(?<=^```console\n)\$ .*?(?=^```$)", re.MULTILINE | re.DOTALL)


MODELS = {
    "Qwen3-VL-Reranker-2B-NVFP4": f"qtool quantize {RERANKER} -o",
    "Qwen3-VL-Embedding-2B-NVFP4": f"qtool quantize {EMBEDDER} -o",
    "Qwen3-VL-Reranker-2B-Q8_0.gguf": f"qtool convert-gguf {RERANKER} --outtype q8_0 -o",
    "Qwen3-VL-Embedding-2B-F16.gguf": f"qtool convert-gguf {EMBEDDER} --outtype f16 -o",
    "broken.gguf": f"qtool convert-gguf {RERANKER} --outtype f16 -o",
}
"""What the commands of the docs are given, and what makes it of a demo model."""


def prepare(text: str, folder: Path) -> None:
    """Put the models that `text` names into `folder`."""
    for name, make in MODELS.items():
        if name in text and not (folder / name).exists():
            run(f"{make} {name}", folder)
            if name == "broken.gguf":
                _break(folder / name)


def _break(path: Path) -> None:
    """Make of a right conversion what a converter writes that takes the reranker for a chat model."""
    right = path.rename(path.with_name("right.gguf"))
    rewritten(right, path, without=[HEAD], drop_fields=RANKING)
    right.unlink()
    path.with_name(f"{path.name}.qtool.json").unlink()


def run(command: str, folder: Path) -> str:
    """What a terminal of COLUMNS columns shows of a shell command in `folder`; an error's output too."""
    programs = folder / ".bin"
    programs.mkdir(exist_ok=True)
    (programs / "qtool").write_text(f'#!/bin/sh\nexec {sys.executable} -m qtool "$@"\n')
    (programs / "qtool").chmod(0o755)
    environment = {
        **os.environ,
        "COLUMNS": COLUMNS,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "QTOOL_CACHE": str(folder / ".cache"),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


def with_output(page: str, folder: Path) -> str:
    """The page's text with the output of its sessions written anew."""
    sessions = SESSION.findall(page)
    prepare("\n".join(sessions), folder)

    def again(session: re.Match[str]) -> str:
        commands = re.findall(r"^\$ (.*)$", session[0], re.MULTILINE)
        return "\n".join(f"$ {command}\n{run(command, folder)}".rstrip() + "\n" for command in commands)

    return SESSION.sub(again, page)


if __name__ == "__main__":
    import tempfile

    for path in PAGES:
        if SESSION.search(path.read_text()):
            with tempfile.TemporaryDirectory() as scratch:
                path.write_text(with_output(path.read_text(), Path(scratch)))
