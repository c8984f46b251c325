"""The plan of a conversion, from headers alone: which tensor goes into which GGUF file, in which element type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from gguf.constants import LlamaFileType

from qtool.arch.detect import Detection
from qtool.arch.gguf_names import PATCH_EMBEDDINGS, POSITION_EMBEDDING
from qtool.arch.spec import Presence, Task, TensorSpec
from qtool.errors import ModelError, UsageError
from qtool.export.gguf_metadata import PROMPTS, PromptChoice
from qtool.export.sources import Frame, GlobalScale, Repacked, Rows, Whole
from qtool.export.tensor_types import parse_tensor_types
from qtool.export.tensor_writer import TensorSource
from qtool.formats.ggml import BF16, F16, F32, GGML_TYPES, NVFP4, Q8_0, GgmlType
from qtool.options import Options
from qtool.storage.checkpoint import Checkpoint, TensorInfo, named_tensors, require_shape
from qtool.storage.gguf_layout import GgufOutputTensor
from qtool.storage.gguf_model import RANK_HEAD
from qtool.storage.packed import PackedWeight, is_quantized, packed_weights

# Element types, as llama.cpp's own converter chooses them, except for the rank head, which is never quantized.


@dataclass(frozen=True)
class FileType:
    """A type of file: its label, its number in `general.file_type`, and the element type of its matrices."""

    label: str
    number: int
    matrices: GgmlType


FILE_TYPES: Final[Mapping[str, FileType]] = {
    "f32": FileType("F32", LlamaFileType.ALL_F32, F32),
    "f16": FileType("F16", LlamaFileType.MOSTLY_F16, F16),
    "bf16": FileType("BF16", LlamaFileType.MOSTLY_BF16, BF16),
    "q8_0": FileType("Q8_0", LlamaFileType.MOSTLY_Q8_0, Q8_0),
    "nvfp4": FileType("NVFP4", LlamaFileType.MOSTLY_NVFP4, NVFP4),
}
"""The types that qtool writes itself."""

LLAMA_QUANTIZE_TYPES: Final[Mapping[str, int]] = {
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
}
"""The types that llama.cpp quantizes, and their numbers in `general.file_type`."""


def element_type(gguf_name: str, shape: tuple[int, ...], matrices: GgmlType) -> GgmlType:
    """The type of one tensor in a file whose matrices are `matrices`."""
    if gguf_name in PATCH_EMBEDDINGS:  # a convolution, which ggml supports for these two only
        return F16 if matrices is F16 else F32
    if len(shape) == 1 or gguf_name.endswith("_norm.weight") or gguf_name == POSITION_EMBEDDING:
        return F32
    if gguf_name == RANK_HEAD and matrices not in (F16, BF16):
        return F32  # two rows that decide every score; llama.cpp's converter quantizes them like the rest
    return matrices if shape[-1] % matrices.block == 0 else F16


# Options. Contradictory ones are refused before anything is opened.

AUTO: Final = "auto"
NO_PROJECTOR: Final = "none"
OUTTYPES: Final = (AUTO, *FILE_TYPES, *LLAMA_QUANTIZE_TYPES)
PROJECTOR_TYPES: Final = (*(name for name in FILE_TYPES if name != "nvfp4"), NO_PROJECTOR)
SUFFIX: Final = ".gguf"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """The options of `qtool convert-gguf`; `output` is a folder, or a file if it ends in .gguf; `stream` is quantize's.

    `tensor_types` are llama.cpp's PATTERN=TYPE for single matrices of K- and I-quants, and `tensor_type_file` has more.
    """

    model: str
    output: Path | None = None
    outtypes: tuple[str, ...] = (AUTO,)
    mmproj: str = "f16"
    task: Task | None = None
    instruction: str | None = None
    prompt: PromptChoice = "official"
    split_max_bytes: int | None = None
    imatrix: Path | None = None
    tensor_types: tuple[str, ...] = ()
    tensor_type_file: Path | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    stream: bool | None = None
    force: bool = False
    dry_run: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the output is one file."""
        return self.output is not None and self.output.suffix == SUFFIX

    def check(self) -> None:
        """Raise UsageError for values that are unknown or contradict each other."""
        unknown = [name for name in self.outtypes if name not in OUTTYPES]
        if unknown:
            raise UsageError(f"Unknown --outtype {unknown[0]!r}.", f"Choose one of {', '.join(OUTTYPES)}.")
        if self.mmproj not in PROJECTOR_TYPES:
            raise UsageError(f"Unknown --mmproj {self.mmproj!r}.", f"Choose one of {', '.join(PROJECTOR_TYPES)}.")
        if self.is_file and len(self.outtypes) > 1:
            raise UsageError("--output is one file; several --outtype need a folder.", "Pass a folder as --output.")
        given = {"imatrix": self.imatrix, "tensor-type": self.tensor_types, "tensor-type-file": self.tensor_type_file}
        for name, value in given.items():
            if value and not any(outtype in LLAMA_QUANTIZE_TYPES for outtype in self.outtypes):
                wanted = ", ".join(LLAMA_QUANTIZE_TYPES)
                raise UsageError(f"--{name} applies to K- and I-quants only.", f"Add one of {wanted} to --outtype.")
        if self.tensor_types or self.tensor_type_file:
            parse_tensor_types(self.tensor_types, self.tensor_type_file)


def parse_outtypes(words: Sequence[str] | None) -> tuple[str, ...]:
    """The types named by `--outtype`, which may be repeated and may contain commas."""
    names = [name.strip().lower() for word in words or (AUTO,) for name in word.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def parse_prompt(word: str) -> PromptChoice:
    """The value of `--prompt`."""
    for known in PROMPTS:
        if word == known:
            return known
    raise UsageError(f"Unknown --prompt {word!r}.", f"Choose one of {', '.join(PROMPTS)}.")


# Tensors. Every tensor of the checkpoint goes into one file, or is left out for a stated reason.


@dataclass(frozen=True)
class PlannedGgufTensor:
    """One output tensor and the source of its bytes."""

    output: GgufOutputTensor
    source: TensorSource


@dataclass(frozen=True)
class Inventory:
    """The checkpoint's tensors by their specification."""

    checkpoint: Checkpoint
    detection: Detection
    tensors: Mapping[TensorSpec, TensorInfo]
    packed: Mapping[str, PackedWeight]

    @property
    def embedding(self) -> TensorInfo:
        """The token embedding."""
        return next(info for spec, info in self.tensors.items() if spec.module.rpartition(".")[2] == "embed_tokens")

    @property
    def head(self) -> TensorInfo:
        """The matrix with a row for each token that can be answered: the head, or the embedding that is tied to it."""
        found = {spec.module.rpartition(".")[2]: info for spec, info in self.tensors.items()}
        tied = bool(self.detection.config.get("tie_word_embeddings", False))
        if not tied and "lm_head" not in found:
            raise ModelError(
                "The checkpoint has no lm_head.weight and tie_word_embeddings is false, so it cannot rank."
            )
        return found["embed_tokens" if tied else "lm_head"]


def take_inventory(checkpoint: Checkpoint, detection: Detection) -> Inventory:
    """The tensors, checked against the architecture. Raises ModelError."""
    packed = packed_weights(checkpoint) if is_quantized(checkpoint.config) else {}
    scales = {scale.hf_name for weight in packed.values() for scale in (weight.block_scales, weight.global_scale)}
    sources = [info for info in checkpoint.tensors.values() if info.hf_name not in scales]
    tensors = named_tensors(sources, detection.architecture, checkpoint.config)
    for spec, info in tensors.items():
        if info.hf_name not in packed:
            require_shape(spec, info)
        elif packed[info.hf_name].shape != spec.shape:
            raise ModelError(
                f"{info.hf_name} has the unpacked shape {list(packed[info.hf_name].shape)}; config.json requires {list(spec.shape)}."
            )
    return Inventory(checkpoint, detection, tensors, packed)


def plan_language(
    inventory: Inventory, file_type: FileType, answers: tuple[int, int] | None
) -> list[PlannedGgufTensor]:
    """The tensors of the language file; `answers` are the ids of yes and no, None for an embedder."""
    _require_type(inventory, file_type)
    matrices, checkpoint = _matrices(inventory, file_type), inventory.checkpoint
    planned: list[PlannedGgufTensor] = []
    if answers is not None:
        planned.append(
            _planned(
                RANK_HEAD, (2, inventory.head.shape[1]), matrices, partial(Rows, checkpoint, inventory.head, answers)
            )
        )
    for spec, info in inventory.tensors.items():
        if _is_written(spec, inventory, answers):
            gguf_name = _name(spec, inventory)
            if info.hf_name in inventory.packed:
                planned += _repacked(gguf_name, checkpoint, inventory.packed[info.hf_name])
            else:
                planned.append(_planned(gguf_name, spec.shape, matrices, partial(Whole, checkpoint, info)))
    return planned


def plan_projector(inventory: Inventory, file_type: FileType) -> list[PlannedGgufTensor]:
    """The tensors of the vision projector's file."""
    planned: list[PlannedGgufTensor] = []
    checkpoint, tower = inventory.checkpoint, inventory.detection.family.vision
    for spec, info in inventory.tensors.items():
        if not inventory.detection.family.is_vision_tensor(spec.hf_name):
            continue
        if tower is not None and spec.hf_name == tower.patch_embedding:
            shape = (*spec.shape[:2], *spec.shape[3:])
            planned += [
                _planned(name, shape, file_type.matrices, partial(Frame, checkpoint, info, frame))
                for frame, name in enumerate(PATCH_EMBEDDINGS)
            ]
        else:
            planned.append(
                _planned(_name(spec, inventory), spec.shape, file_type.matrices, partial(Whole, checkpoint, info))
            )
    return planned


def automatic_type(inventory: Inventory) -> FileType:
    """`auto`: the lossless type."""
    if inventory.packed:
        return FILE_TYPES["nvfp4"]
    dtypes = {info.dtype for spec, info in inventory.tensors.items() if len(spec.shape) > 1}
    return FILE_TYPES[dtypes.pop().lower() if len(dtypes) == 1 else "f32"]


def _is_written(spec: TensorSpec, inventory: Inventory, answers: tuple[int, int] | None) -> bool:
    """Whether the language file contains it: not the vision tower, a tied head, or a head that the rank head replaces."""
    is_replaced = spec.module == "lm_head" and answers is not None
    is_vision = inventory.detection.family.is_vision_tensor(spec.hf_name)
    return not is_vision and spec.presence is not Presence.DUPLICATE and not is_replaced


def _name(spec: TensorSpec, inventory: Inventory) -> str:
    detection = inventory.detection
    gguf_name = detection.family.gguf_names.of(spec.hf_name, detection.vision.get("deepstack_visual_indexes", ()))
    if gguf_name is None:
        raise ModelError(
            f"{spec.hf_name} {list(spec.shape)} has no counterpart in llama.cpp's {detection.family.gguf_architecture}."
        )
    return gguf_name


def _planned(
    gguf_name: str, shape: tuple[int, ...], matrices: GgmlType, source: Callable[[str, GgmlType], TensorSource]
) -> PlannedGgufTensor:
    chosen = element_type(gguf_name, shape, matrices)
    elements = 1
    for size in shape:
        elements *= size
    return PlannedGgufTensor(
        GgufOutputTensor(gguf_name, chosen, shape, chosen.nbytes(elements)), source(gguf_name, chosen)
    )


def _repacked(gguf_name: str, checkpoint: Checkpoint, weight: PackedWeight) -> Iterator[PlannedGgufTensor]:
    rows, columns = weight.shape
    if columns % NVFP4.block:
        raise ModelError(
            f"{weight.packed.hf_name} [{rows}, {columns}]: The number of columns is not a multiple of {NVFP4.block}, "
            "the size of GGUF's NVFP4 blocks."
        )
    yield PlannedGgufTensor(
        GgufOutputTensor(gguf_name, NVFP4, weight.shape, NVFP4.nbytes(rows * columns)),
        Repacked(checkpoint, weight, gguf_name),
    )
    scale_name = gguf_name.removesuffix(".weight") + ".scale"
    yield PlannedGgufTensor(GgufOutputTensor(scale_name, F32, (1,), 4), GlobalScale(checkpoint, weight, scale_name))


def _require_type(inventory: Inventory, file_type: FileType) -> None:
    if inventory.packed and file_type.matrices is not NVFP4:
        raise UsageError(
            f"The checkpoint is NVFP4; {file_type.label} would make it larger without better scores.",
            "Pass --outtype nvfp4, or convert the checkpoint that it was quantized from.",
        )
    if not inventory.packed and file_type.matrices is NVFP4:
        raise UsageError(
            "--outtype nvfp4 needs an NVFP4 checkpoint; this one is not quantized.",
            "Run `qtool quantize` first, and convert its output.",
        )


def _matrices(inventory: Inventory, file_type: FileType) -> GgmlType:
    """The type of unpacked matrices; those beside NVFP4 weights keep theirs."""
    if file_type.matrices is not NVFP4:
        return file_type.matrices
    return next(each for each in GGML_TYPES.values() if each.name == inventory.embedding.dtype)


def require_rankable(detection: Detection) -> None:
    """Raise ModelError for a reranker whose head a GGUF file cannot contain."""
    if detection.task is Task.RERANK and detection.architecture.head != "lm_head":
        raise ModelError(
            f"{detection.architecture.name} has a `score` head, whose prompt and labels no file declares.",
            "Convert the original checkpoint, which scores by its yes and no tokens.",
        )
