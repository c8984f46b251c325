"""The model that an artefact is compared with, and the GGUF files that converting it would give."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from typing_extensions import override

from qtool import resources
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.errors import UsageError
from qtool.export.convert import plan_conversion
from qtool.export.gguf_files import Namer, PlannedFile, projector_file
from qtool.export.gguf_plan import NO_PROJECTOR, ConvertOptions, take_inventory
from qtool.storage.byte_source import ByteSource
from qtool.storage.checkpoint import SINGLE
from qtool.storage.gguf import Value, parse_gguf
from qtool.storage.hub import Source, resolve
from qtool.storage.packed import is_quantized

_PLANNED_TYPE: Final = "q8_0"
"""Shows which tensors a converter never quantizes: those that are no Q8_0 in it."""


@dataclass(frozen=True)
class Planned:
    """A GGUF file as converting the reference would write it."""

    file: PlannedFile
    metadata: Mapping[str, Value]


@dataclass(frozen=True)
class Reference(CheckpointArtefact):
    """A checkpoint as the reference of a comparison."""

    def require_unquantized(self) -> None:
        """Raise UsageError if it is quantized itself, ModelError if it cannot be read."""
        if is_quantized(self.checkpoint.config):
            raise UsageError(f"The reference {self.path} is quantized.", "Name the model that it was made from.")

    @cached_property
    def is_demo(self) -> bool:
        """Whether its weights are, byte for byte, those of a demo model: its name and place say nothing."""
        weights = self.path / SINGLE
        demos = (resources.demo_model(name) / SINGLE for name in resources.demo_models())
        return weights.is_file() and any(filecmp.cmp(weights, demo, shallow=False) for demo in demos)

    @cached_property
    def language(self) -> Planned:
        """The language model's file."""
        options = ConvertOptions(
            model=str(self.path), outtypes=(_PLANNED_TYPE,), mmproj=NO_PROJECTOR, task=self.asked_task
        )
        (file,) = plan_conversion(options, self).files
        return _planned(file)

    @cached_property
    def projector(self) -> Planned:
        """The vision projector's file, of a model that has one."""
        inventory = take_inventory(self.checkpoint, self.detection)
        return _planned(projector_file("f16", self.source, inventory, Namer(None, self.source)))


def open_reference(
    target: str, task: Task | None = None, revision: str | None = None, token: str | None = None
) -> Reference:
    """Find the reference: a folder, a built-in demo model, or a repository on the hub, which is downloaded."""
    return Reference(resolve(target, revision, token), task)


def reference_in(folder: Path, task: Task | None = None) -> Reference:
    """The reference in a folder of this disk."""
    return Reference(Source(folder, folder.name), task)


def _planned(file: PlannedFile) -> Planned:
    layout = file.layouts[0]
    return Planned(file, parse_gguf(_HeaderBytes(layout.file_name, layout.nbytes, layout.header)).metadata)


class _HeaderBytes(ByteSource):
    """A file of which only the header exists."""

    def __init__(self, name: str, size: int, header: bytes) -> None:
        self.name, self.size, self.chunk = name, size, len(header)
        self._header = header

    @override
    def read(self, offset: int, nbytes: int) -> bytes:
        return self._header[offset : offset + nbytes]
