"""Quantizing and converting from a hub on loopback, at the speed of a link and of the machine, against a bare download."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from pathlib import Path

from tests.bench.goals import Goal, Jobs, qtool, within

GIGABIT = 125_000_000
"""Bytes a second."""
_LINKS = {"1 Gbit/s": GIGABIT, "loopback": None}


def hub_jobs(folder: Path, shapes: list[str]) -> Jobs:
    """A download by curl and by huggingface_hub, and quantizing and converting by range; each writes `folder`/out."""
    jobs: Jobs = {}
    out = folder / "out"
    for shape in (shape for shape in shapes if shape == "2B"):
        source = folder / shape
        for link, rate in _LINKS.items():
            url = _serve(source, rate)
            hub = ["env", f"HF_ENDPOINT={url}", f"HF_HOME={out / 'home'}", "HF_HUB_DISABLE_XET=1"]
            files = [f"{url}/org/model/resolve/main/{path.name}" for path in source.iterdir()]
            fetch = "import huggingface_hub; huggingface_hub.snapshot_download('org/model')"
            jobs[f"{shape} {link} curl"] = [
                "curl",
                "-sSf",
                "--create-dirs",
                "--output-dir",
                str(out),
                "--remote-name-all",
                *files,
            ]
            jobs[f"{shape} {link} hf download"] = [*hub, sys.executable, "-c", fetch]
            made = str(out / "made")
            jobs[f"{shape} {link} quantize"] = [*hub, *qtool("quantize", "org/model", "-o", made, "--stream")]
            convert = ("convert-gguf", "org/model", "-o", made, "--stream", "--mmproj", "none", "--outtype")
            jobs[f"{shape} {link} q8_0"] = [*hub, *qtool(*convert, "q8_0")]
            jobs[f"{shape} {link} f16,q8_0"] = [*hub, *qtool(*convert, "f16,q8_0")]
    return jobs


def hub_goals(_folder: Path) -> list[Goal]:
    """The whole job takes little longer than the download; memory as from disk."""
    goals = [
        _over(f"2B 1 Gbit/s: {job} over the download by curl, at most 1.1 times its time", f"2B 1 Gbit/s {job}", 1.1)
        for job in ("quantize", "q8_0", "f16,q8_0")
    ]
    goals += [
        _over(f"2B loopback: {job} over the download by curl", f"2B loopback {job}", None)
        for job in ("quantize", "q8_0")
    ]
    return goals + [within(f"2B {link}: quantize", f"2B {link} quantize", 600) for link in _LINKS]


def _over(text: str, name: str, most: float | None) -> Goal:
    bare = f"{name.rpartition(' ')[0]} curl"
    return Goal(text, lambda m: m[name].seconds / m[bare].seconds, (name, bare), most=most)


def _serve(folder: Path, rate: float | None) -> str:
    """Start a hub that serves `folder` until this process ends; its address."""
    command = [sys.executable, "-m", "tests.hub", str(folder), *(["--rate", str(rate)] if rate else [])]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    atexit.register(server.terminate)
    assert server.stdout is not None
    return server.stdout.readline().strip()
