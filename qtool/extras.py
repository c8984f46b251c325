"""The packages that each extra of the distribution brings, and the error that names the command for a missing one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from qtool.errors import SetupError

DISTRIBUTION: Final = "qtool-retrieval"
"""What pip installs; PyPI's `qtool` is another project's."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An extra: what it enables, and its packages by import name with the names that pip knows."""

    name: str
    enables: str
    packages: Mapping[str, str]

    @property
    def command(self) -> str:
        """What installs it."""
        return f"{_installer()} '{DISTRIBUTION}[{self.name}]'"

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed, as pip names them."""
        return [package for module, package in self.packages.items() if not is_installed(module)]


def _installer() -> str:
    """`pip install`, but where `uv tool install` made this environment: it has no pip, and is replaced as a whole."""
    return "uv tool install" if (Path(sys.prefix) / "uv-receipt.toml").is_file() else "pip install"


_SCORE: Final = {"torch": "torch", "transformers": "transformers"}

EXTRAS: Final[Mapping[str, Extra]] = {
    extra.name: extra
    for extra in (
        Extra(name="score", enables="score, embed, verify and calibrate checkpoints; demo", packages=_SCORE),
        Extra(
            name="modelopt", enables="quantize --backend modelopt", packages={"modelopt": "nvidia-modelopt", **_SCORE}
        ),
        Extra(name="datasets", enables="panels from data sets (--dataset)", packages={"datasets": "datasets"}),
        Extra(name="llamacpp", enables="score, embed and verify GGUF files", packages={"xllamacpp": "xllamacpp"}),
        Extra(name="video", enables="videos in panels", packages={"av": "av", "torch": "torch"}),
    )
}


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found, which is not imported; a mere folder `datasets` in the path is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def require_extra(name: str, purpose: str, otherwise: str = "") -> None:
    """Raise SetupError unless the packages of an extra are installed.

    `purpose` is the subject of the sentence; `otherwise` is what the user can do instead, such as "pass --structure-only".
    """
    extra = EXTRAS[name]
    if missing := extra.missing:
        listed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        alternative = f", or {otherwise}" if otherwise else ""
        raise SetupError(
            f"{purpose} needs {listed}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            f"Run `{extra.command}`{alternative}.",
        )


def import_failure(error: ImportError) -> SetupError:
    """An import that failed, as an error that says how to install the package."""
    module = (error.name or "").partition(".")[0]
    if module == "fcntl":
        return SetupError("qtool runs on Linux and macOS only.", "On Windows, run it in WSL.")
    extra = next((extra for extra in EXTRAS.values() if module in extra.packages), None)
    command = extra.command if extra else f"{_installer()} {DISTRIBUTION}"
    if isinstance(error, ModuleNotFoundError):
        package = extra.packages[module] if extra else module
        return SetupError(f"The package {package} is not installed.", f"Run `{command}`.")
    reason = " ".join(str(error).split()).rstrip(".")
    return SetupError(
        f"{f'The package {module}' if module else 'A package'} cannot be imported: {reason}.",
        f"Run `qtool doctor` to compare versions, then `{command} --upgrade`.",
    )
