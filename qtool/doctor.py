"""`qtool doctor`: what this machine can do, what is missing, and what is wrong."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from qtool.extras import DISTRIBUTION, EXTRAS, Extra, is_installed
from qtool.manifest import installed_version

State = Literal["ok", "missing", "wrong", "info"]
_STYLE: Final = {"ok": "green", "missing": "yellow", "wrong": "bold red", "info": "dim"}
_DISK_FOR_8B: Final = 25 * 10**9
_HUB_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Diagnosis:
    """One fact about the machine. `missing` limits what qtool can do, `wrong` must be put right."""

    subject: str
    state: State
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fact as a JSON object."""
        return asdict(self)


def examine() -> list[Diagnosis]:
    """Everything about this machine that qtool's commands depend on; asks the hub for one page, imports nothing heavy."""
    return [*_packages(), *_programs(), *_devices(), *_resources(), *_hub()]


def is_healthy(findings: Sequence[Diagnosis]) -> bool:
    """Whether nothing is wrong; a missing extra is not."""
    return all(finding.state != "wrong" for finding in findings)


def diagnoses_table(findings: Sequence[Diagnosis]) -> Table:
    """One row a fact."""
    table = Table("subject", "state", "found", "advice", box=None, pad_edge=False)
    for finding in findings:
        cells = finding.subject, finding.detail, finding.advice
        subject, detail, advice = map(Text, cells)  # as Text, so that [extras] are not taken for markup
        table.add_row(subject, Text(finding.state, _STYLE[finding.state]), detail, advice)
    return table


def _packages() -> Iterator[Diagnosis]:
    yield Diagnosis("python", "ok", platform.python_version())
    if installed_version("qtool") is not None:
        yield Diagnosis(
            "qtool",
            "wrong",
            f"the distribution qtool, which is not {DISTRIBUTION}, is installed and writes to the same folder",
            f"pip uninstall qtool, then pip install --force-reinstall {DISTRIBUTION}",
        )
    try:
        requirements = [Requirement(each) for each in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        found = f"runs from {Path(__file__).parents[1]} and is not installed"
        yield Diagnosis(DISTRIBUTION, "wrong", found, f"pip install {DISTRIBUTION}")
        return
    for requirement in requirements:
        if requirement.marker is None:
            yield _package(requirement, "wrong", f"pip install {DISTRIBUTION}")
    seen: set[str] = set()
    for extra in EXTRAS.values():
        for requirement in requirements:
            if (
                requirement.marker
                and requirement.marker.evaluate({"extra": extra.name})
                and requirement.name not in seen
            ):
                seen.add(requirement.name)
                yield _package(requirement, "missing", extra.command)
    yield from map(_extra, EXTRAS.values())


def _package(requirement: Requirement, if_missing: State, command: str) -> Diagnosis:
    found, expected = installed_version(requirement.name), str(requirement.specifier)
    if found is None:
        return Diagnosis(requirement.name, if_missing, f"not installed; expected {expected}", command)
    if not requirement.specifier.contains(found, prereleases=True):
        return Diagnosis(requirement.name, "wrong", f"{found}; expected {expected}", f"{command} --upgrade")
    return Diagnosis(requirement.name, "ok", f"{found} ({expected})")


def _extra(extra: Extra) -> Diagnosis:
    subject = f"[{extra.name}]"
    if missing := extra.missing:
        return Diagnosis(subject, "missing", f"{', '.join(missing)} not installed; for: {extra.enables}", extra.command)
    return Diagnosis(subject, "ok", extra.enables)


def _programs() -> Iterator[Diagnosis]:
    for program, purpose in (
        ("llama-quantize", "K- and I-quants in convert-gguf; llama-cpp-python serves as well"),
        ("llama-server", "serving GGUF files"),
    ):
        found = shutil.which(program)
        yield Diagnosis(program, "ok" if found else "info", found or f"not on PATH; for: {purpose}")


def _devices() -> Iterator[Diagnosis]:
    yield Diagnosis("cpu", "info", f"{platform.machine()}, {os.cpu_count()} cores")
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        yield Diagnosis("gpu", "ok", driver.read_text().splitlines()[0])
    else:
        yield Diagnosis("gpu", "info", "no NVIDIA driver; no command needs one")
    yield Diagnosis("torch's CUDA", "info", _torch_cuda())
    for module, absent in (
        ("triton", "not installed; for: ModelOpt's algorithms on a GPU; comes with torch for CUDA"),
        ("torchvision", "not installed; not needed, since qtool resizes pictures itself"),
    ):
        yield Diagnosis(module, "info", (installed_version(module) or "installed") if is_installed(module) else absent)


def _torch_cuda() -> str:
    """CUDA version that torch was built for, read from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "no torch"
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "torch is not installed completely"
    found = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else "none (CPU build)"


def _resources() -> Iterator[Diagnosis]:
    free = shutil.disk_usage(Path.cwd()).free
    size = f"{free / 1e9:.1f} GB"
    if free > _DISK_FOR_8B:
        yield Diagnosis("free disk here", "ok", size)
    else:
        advice = "an 8B model and its quantized copy need about 25 GB"
        yield Diagnosis("free disk here", "missing", size, advice)
    memory = _available_memory()
    found = "unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    yield Diagnosis("free memory", "info", f"{found}; streaming needs 0.6 GB")


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
    yield Diagnosis("hub token", "info", "present" if get_token() else "none; public models only")
    if constants.is_offline_mode():
        yield Diagnosis("hub", "info", "offline: HF_HUB_OFFLINE is set")
    else:
        yield _hub_answer(constants.ENDPOINT)


def _hub_answer(endpoint: str) -> Diagnosis:
    from qtool.transfer import hub_session, within

    try:
        with within(_HUB_SECONDS):
            response = hub_session().head(endpoint, timeout=_HUB_SECONDS, follow_redirects=True)
    except Exception as error:  # noqa: BLE001 - a wrong address, proxy or certificate share no base class
        problem = f"{endpoint} cannot be reached: {error or type(error).__name__}"
    else:
        if not response.is_server_error:  # 401 or 405 is an answer, too
            return Diagnosis("hub", "ok", f"{endpoint} answers")
        problem = f"{endpoint} answers with status {response.status_code}"
    return Diagnosis(
        "hub", "wrong", problem, "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use local models only"
    )
