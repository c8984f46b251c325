"""What `convert-gguf` is asked to do.

Rule: options that contradict each other are refused here, before anything is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qtool.arch.spec import Task
from qtool.convert.templates import PROMPTS, PromptChoice
from qtool.convert.types import FILE_TYPES, LLAMA_QUANTIZE_TYPES
from qtool.errors import UsageError

AUTO: Final = "auto"
NO_PROJECTOR: Final = "none"
OUTTYPES: Final = (AUTO, *FILE_TYPES, *LLAMA_QUANTIZE_TYPES)
PROJECTOR_TYPES: Final = (*(name for name in FILE_TYPES if name != "nvfp4"), NO_PROJECTOR)
SUFFIX: Final = ".gguf"


@dataclass(frozen=True)
class ConvertOptions:
    """What `qtool convert-gguf` is asked to do; `output` is a folder, or a file when it ends in .gguf."""

    model: str
    output: Path | None
    outtypes: tuple[str, ...] = (AUTO,)
    mmproj: str = "f16"
    task: Task | None = None
    instruction: str | None = None
    prompt: PromptChoice = "official"
    split_max_bytes: int | None = None
    imatrix: Path | None = None
    revision: str | None = None
    token: str | None = None
    force: bool = False
    dry_run: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the output is one file."""
        return self.output is not None and self.output.suffix == SUFFIX

    def check(self) -> None:
        """Raise UsageError where the options make no sense."""
        unknown = [name for name in self.outtypes if name not in OUTTYPES]
        if unknown:
            raise UsageError(f"Unknown --outtype {unknown[0]!r}.", f"Known are {', '.join(OUTTYPES)}.")
        if self.mmproj not in PROJECTOR_TYPES:
            raise UsageError(f"Unknown --mmproj {self.mmproj!r}.", f"Known are {', '.join(PROJECTOR_TYPES)}.")
        if self.is_file and len(self.outtypes) > 1:
            raise UsageError("Several types do not fit into one file.", "Pass a folder as --output.")
        if self.imatrix and not any(name in LLAMA_QUANTIZE_TYPES for name in self.outtypes):
            wanted = ", ".join(LLAMA_QUANTIZE_TYPES)
            raise UsageError("--imatrix guides the K- and I-quants only.", f"Add one of {wanted}.")


def parse_outtypes(words: Sequence[str] | None) -> tuple[str, ...]:
    """The types named by `--outtype`, which may be repeated and may hold commas."""
    names = [name.strip().lower() for word in words or (AUTO,) for name in word.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def parse_prompt(word: str) -> PromptChoice:
    """The value of `--prompt`."""
    for known in PROMPTS:
        if word == known:
            return known
    raise UsageError(f"Unknown --prompt {word!r}.", f"Known are {', '.join(PROMPTS)}.")
