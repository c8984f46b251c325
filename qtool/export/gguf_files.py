"""The GGUF files of a conversion: names, metadata, tensors and layout, planned before the first weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from gguf.constants import GGUFValueType

from qtool.arch.prompts import NO, YES
from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.export.gguf_metadata import (
    Origin,
    decoder_metadata,
    deepstack_metadata,
    general_metadata,
    sampling_metadata,
    task_metadata,
    template_metadata,
    token_id,
    tokenizer_metadata,
    vision_metadata,
)
from qtool.export.gguf_plan import (
    AUTO,
    FILE_TYPES,
    LLAMA_QUANTIZE_TYPES,
    SUFFIX,
    ConvertOptions,
    FileType,
    Inventory,
    PlannedGgufTensor,
    automatic_type,
    plan_language,
    plan_projector,
)
from qtool.formats.ggml import NVFP4
from qtool.storage.gguf import Value, array
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out
from qtool.storage.gguf_model import PROJECTOR
from qtool.storage.hub import Source
from qtool.storage.output_files import FileLayout

MODEL: Final = "model"
INTERMEDIATE: Final = "intermediate"
PROJECTOR_ROLE: Final = "mmproj"
_SIZE_IN_NAME: Final = re.compile(r"(^|[-_])\d+(\.\d+)?[MB]($|[-_])", re.IGNORECASE)


@dataclass(frozen=True)
class PlannedFile:
    """One GGUF file (or its parts) that qtool writes, with its tensors."""

    role: str
    type: FileType
    tensors: tuple[PlannedGgufTensor, ...]
    layouts: tuple[FileLayout, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def work_bytes(self) -> int:
        """Source bytes that are read to write it: the total of the calls of `advance`."""
        return sum(tensor.source.work_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per value."""
        outputs = [tensor.output for tensor in self.tensors]
        return 8 * sum(output.nbytes for output in outputs) / sum(prod(output.shape) for output in outputs)


class Namer:
    """File names for the Hub's loaders: `llama-server -hf repo:TAG` looks for `…-TAG.gguf` and `mmproj-…`."""

    def __init__(self, output: Path | None, source: Source) -> None:
        self._given = output.name if output is not None and output.suffix == SUFFIX else None
        self.model = source.origin.rpartition("/")[2]
        self._size = ""

    def add_size(self, label: str) -> None:
        """Add the number of parameters to the names, unless the model's own name contains it."""
        if not _SIZE_IN_NAME.search(self.model):
            self._size = f"-{label}"

    def language(self, label: str) -> str:
        """The language file's name."""
        return self._given or f"{self.model}{self._size}-{label}{SUFFIX}"

    def projector(self, label: str) -> str:
        """The projector's name."""
        return f"mmproj-{self._given or f'{self.model}{self._size}-{label}{SUFFIX}'}"


def language_files(
    options: ConvertOptions,
    opened: CheckpointArtefact,
    inventory: Inventory,
    task: Task,
    template: str | None,
    namer: Namer,
) -> Iterator[PlannedFile]:
    """The language files that qtool writes, with a lossless one as the source of those that llama.cpp quantizes."""
    source, answers = opened.source, None
    if task is Task.RERANK:
        answers = (token_id(opened.tokenizer, YES), token_id(opened.tokenizer, NO))
    shared = _shared_metadata(source, opened.tokenizer, inventory, task, template)
    for role, file_type in _own_types(options.outtypes, inventory):
        tensors = plan_language(inventory, file_type, answers)
        architecture = inventory.detection.family.gguf_architecture
        general = _general(architecture, "model", source, tensors, file_type)
        namer.add_size(general["general.size_label"].data)
        is_kept = role == MODEL
        file_name = namer.language(file_type.label) if is_kept else f"{INTERMEDIATE}-{file_type.label}{SUFFIX}"
        metadata = {**general, **shared, **_precision_metadata(tensors)}
        layouts = lay_out(file_name, metadata, _outputs(tensors), options.split_max_bytes if is_kept else None)
        yield PlannedFile(role, file_type, tuple(tensors), tuple(layouts))


def projector_file(mmproj: str, source: Source, inventory: Inventory, namer: Namer) -> PlannedFile:
    """The vision projector's file."""
    file_type = FILE_TYPES[mmproj]
    tensors = plan_projector(inventory, file_type)
    metadata = {
        **_general(PROJECTOR, "mmproj", source, tensors, file_type),
        **vision_metadata(inventory.detection, source.directory),
    }
    layouts = lay_out(namer.projector(file_type.label), metadata, _outputs(tensors))
    return PlannedFile(PROJECTOR_ROLE, file_type, tuple(tensors), tuple(layouts))


def _outputs(tensors: Sequence[PlannedGgufTensor]) -> list[GgufOutputTensor]:
    return [tensor.output for tensor in tensors]


def _own_types(outtypes: Sequence[str], inventory: Inventory) -> Iterator[tuple[str, FileType]]:
    automatic = automatic_type(inventory)
    own = [automatic if name == AUTO else FILE_TYPES[name] for name in outtypes if name not in LLAMA_QUANTIZE_TYPES]
    for file_type in dict.fromkeys(own):
        yield MODEL, file_type
    if len(own) < len(outtypes):
        yield INTERMEDIATE, automatic


def _shared_metadata(
    source: Source, tokenizer: Mapping[str, Any], inventory: Inventory, task: Task, template: str | None
) -> dict[str, Value]:
    """The metadata that all language files of a checkpoint share."""
    detection, family = inventory.detection, inventory.detection.family
    fields = {**decoder_metadata(family, detection.text), **task_metadata(family.gguf_architecture, task)}
    if family.is_vision:
        fields |= deepstack_metadata(family.gguf_architecture, detection.vision)
    return {
        **fields,
        **tokenizer_metadata(source.directory, tokenizer, inventory.embedding.shape[0], family.tokenizer),
        **template_metadata(source.directory, template),
    }


def _general(
    architecture: str, kind: str, source: Source, tensors: list[PlannedGgufTensor], file_type: FileType
) -> dict[str, Value]:
    parameters = sum(prod(tensor.output.shape) for tensor in tensors)
    is_on_hub = source.revision is not None
    repository = f"https://huggingface.co/{source.origin.removeprefix('hf://')}" if is_on_hub else None
    origin = Origin(source.origin.rpartition("/")[2], repository)
    return {
        **general_metadata(architecture, kind, origin, parameters, file_type.number),
        **sampling_metadata(source.directory),
    }


def _precision_metadata(tensors: list[PlannedGgufTensor]) -> dict[str, Value]:
    """W4A16: by default llama.cpp quantizes the activations of NVFP4 tensors on Blackwell, which this disables."""
    names = sorted(tensor.output.gguf_name for tensor in tensors if tensor.output.type is NVFP4)
    if not names:
        return {}
    return {
        "general.tensor_extra.name": array(GGUFValueType.STRING, names),
        "general.tensor_extra.prec_a4": array(GGUFValueType.BOOL, [False] * len(names)),
    }
