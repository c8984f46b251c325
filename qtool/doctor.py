"""`qtool doctor`: whether this machine can do each of qtool's jobs, and what is missing if not.

Rule: it looks, and imports nothing heavy; a finding that is not "ok" says what to do.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

State = Literal["ok", "missing", "wrong", "info"]
_STYLE: Final = {"ok": "green", "missing": "yellow", "wrong": "bold red", "info": "dim"}
_DISK_FOR_8B: Final = 25 * 10**9


@dataclass(frozen=True)
class Diagnosis:
    """One thing looked at. `missing` limits what can be done, `wrong` breaks it."""

    subject: str
    state: State
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as a JSON object."""
        return asdict(self)


def examine() -> list[Diagnosis]:
    """Everything about this machine that qtool's jobs depend on."""
    return [*_packages(), *_devices(), *_engines(), *_resources(), *_hub()]


def diagnoses_table(findings: list[Diagnosis]) -> Table:
    """One row a finding."""
    table = Table("subject", "state", "found", "advice", box=None, pad_edge=False)
    for finding in findings:
        cells = finding.subject, finding.detail, finding.advice
        subject, detail, advice = map(Text, cells)  # as Text, so that [extras] are not taken for markup
        table.add_row(subject, Text(finding.state, _STYLE[finding.state]), detail, advice)
    return table


def _packages() -> Iterator[Diagnosis]:
    yield Diagnosis("python", "ok", platform.python_version())
    for requirement in map(Requirement, requires("qtool") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Diagnosis:
    found = _installed(requirement.name)
    wanted = str(requirement.specifier)
    if found is None:
        return Diagnosis(requirement.name, "wrong", f"not installed, needs {wanted}", f"pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return Diagnosis(requirement.name, "wrong", f"{found}, needs {wanted}", f"pip install '{requirement}'")
    return Diagnosis(requirement.name, "ok", f"{found} ({wanted})")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Diagnosis]:
    yield Diagnosis("cpu", "info", f"{platform.machine()}, {os.cpu_count()} cores")
    yield Diagnosis("torch's CUDA", "info", _torch_cuda())
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        yield Diagnosis("gpu", "ok", driver.read_text().splitlines()[0])
    else:
        yield Diagnosis("gpu", "info", "no NVIDIA driver; every job of qtool runs without")
    yield _optional("triton", "triton", "ModelOpt's CUDA-only algorithms", "comes with torch's CUDA build")


def _torch_cuda() -> str:
    """CUDA version that torch was built for, read from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "no torch"
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else "none (CPU build)"


def _engines() -> Iterator[Diagnosis]:
    yield _optional("llama.cpp in process", "xllamacpp", "scoring GGUF files", "pip install 'qtool[llamacpp]'")
    for program in ("llama-quantize", "llama-server"):
        where = shutil.which(program)
        yield Diagnosis(program, "ok" if where else "info", where or "not on PATH")
    yield _optional(
        "torchvision", "torchvision", "transformers' fast picture processors", "not needed: qtool brings its own"
    )
    yield _optional("video", "av", "video documents", "pip install 'qtool[video]'")


def _optional(subject: str, module: str, purpose: str, advice: str) -> Diagnosis:
    if find_spec(module) is None:
        return Diagnosis(subject, "info", f"absent ({purpose})", advice)
    return Diagnosis(subject, "ok", _installed(module) or "present")


def _resources() -> Iterator[Diagnosis]:
    free = shutil.disk_usage(Path.cwd()).free
    advice = "an 8B model needs about 25 GB with its quantized copy"
    yield Diagnosis(
        "free disk here",
        "ok" if free > _DISK_FOR_8B else "missing",
        f"{free / 1e9:.1f} GB",
        advice if free <= _DISK_FOR_8B else "",
    )
    memory = _available_memory()
    yield Diagnosis(
        "free memory", "info", "unknown" if memory is None else f"{memory / 1e9:.1f} GB", "streaming needs 0.6 GB"
    )


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(available.split()[1]) * 1024 if available else None


def _hub() -> Iterator[Diagnosis]:
    from huggingface_hub import constants, get_token

    yield Diagnosis("hub cache", "info", str(constants.HF_HUB_CACHE))
    yield Diagnosis(
        "hub token", "ok" if get_token() else "info", "present" if get_token() else "none (public models only)"
    )
    offline = bool(constants.HF_HUB_OFFLINE)
    yield Diagnosis("hub", "info", "offline (HF_HUB_OFFLINE)" if offline else f"online ({constants.ENDPOINT})")
