"""Decides, from headers alone, what lies in each GGUF file.

Rule: every tensor of the checkpoint goes into exactly one place or is left out for a stated reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qtool.arch.detect import Detection
from qtool.arch.spec import Presence, Task, TensorSpec, section
from qtool.checkpoint.reader import Checkpoint, TensorInfo
from qtool.convert.names import PATCH_EMBEDDINGS, RANK_HEAD, gguf_name_of
from qtool.convert.sources import Frame, GlobalScale, Repacked, Rows, TensorSource, Whole
from qtool.convert.types import FILE_TYPES, FileType, element_type
from qtool.errors import ModelError, UsageError
from qtool.formats.ggml import F32, GGML_TYPES, NVFP4, GgmlType
from qtool.gguf_file.layout import OutputTensor
from qtool.inventory.packed import PackedWeight, is_quantized, packed_weights
from qtool.inventory.tensors import named_tensors, require_shape

_FRAMES = ".patch_embed.proj.weight"


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor and where its bytes come from."""

    output: OutputTensor
    source: TensorSource


@dataclass(frozen=True)
class Inventory:
    """The checkpoint's tensors by what they are."""

    checkpoint: Checkpoint
    detection: Detection
    tensors: Mapping[TensorSpec, TensorInfo]
    packed: Mapping[str, PackedWeight]

    @property
    def embedding(self) -> TensorInfo:
        """The matrix of the tokens' vectors."""
        return next(info for spec, info in self.tensors.items() if spec.module.rpartition(".")[2] == "embed_tokens")

    @property
    def head(self) -> TensorInfo:
        """The matrix whose rows the answers are: the head, or the embedding that is tied to it."""
        found = {spec.module.rpartition(".")[2]: info for spec, info in self.tensors.items()}
        tied = bool(self.detection.config.get("tie_word_embeddings", False))
        if not tied and "lm_head" not in found:
            raise ModelError("The checkpoint has no lm_head.weight, and tie_word_embeddings is false: it cannot rank.")
        return found["embed_tokens" if tied else "lm_head"]


def take_inventory(checkpoint: Checkpoint, detection: Detection) -> Inventory:
    """What is there, checked against the architecture."""
    packed = packed_weights(checkpoint) if is_quantized(checkpoint.config) else {}
    scales = {scale.hf_name for weight in packed.values() for scale in (weight.block_scales, weight.global_scale)}
    sources = [info for info in checkpoint.tensors.values() if info.hf_name not in scales]
    tensors = named_tensors(sources, detection.architecture, checkpoint.config)
    for spec, info in tensors.items():
        if info.hf_name not in packed:
            require_shape(spec, info)
        elif packed[info.hf_name].shape != spec.shape:
            raise ModelError(
                f"{info.hf_name} stands for {packed[info.hf_name].shape}; config.json makes it {spec.shape}."
            )
    return Inventory(checkpoint, detection, tensors, packed)


def plan_language(inventory: Inventory, file_type: FileType, answers: tuple[int, int] | None) -> list[PlannedTensor]:
    """The tensors of the language file; `answers` are the ids of yes and no, None for an embedder."""
    _require_type(inventory, file_type)
    matrices, checkpoint = _matrices(inventory, file_type), inventory.checkpoint
    planned: list[PlannedTensor] = []
    if answers is not None:
        planned.append(
            _planned(RANK_HEAD, (2, inventory.head.shape[1]), matrices, Rows(checkpoint, inventory.head, answers))
        )
    for spec, info in inventory.tensors.items():
        if _is_written(spec, answers):
            gguf_name = _name(spec, inventory)
            if info.hf_name in inventory.packed:
                planned += _repacked(gguf_name, checkpoint, inventory.packed[info.hf_name])
            else:
                planned.append(_planned(gguf_name, spec.shape, matrices, Whole(checkpoint, info)))
    return planned


def plan_projector(inventory: Inventory, file_type: FileType) -> list[PlannedTensor]:
    """The tensors of the vision projector's file."""
    planned: list[PlannedTensor] = []
    checkpoint = inventory.checkpoint
    for spec, info in inventory.tensors.items():
        if not _is_vision(spec):
            continue
        if spec.hf_name.endswith(_FRAMES):
            shape = (*spec.shape[:2], *spec.shape[3:])
            planned += [
                _planned(name, shape, file_type.matrices, Frame(checkpoint, info, frame))
                for frame, name in enumerate(PATCH_EMBEDDINGS)
            ]
        else:
            planned.append(_planned(_name(spec, inventory), spec.shape, file_type.matrices, Whole(checkpoint, info)))
    return planned


def automatic_type(inventory: Inventory) -> FileType:
    """`auto`: the type that loses nothing."""
    if inventory.packed:
        return FILE_TYPES["nvfp4"]
    dtypes = {info.dtype for spec, info in inventory.tensors.items() if len(spec.shape) > 1}
    return FILE_TYPES[dtypes.pop().lower() if len(dtypes) == 1 else "f32"]


def _is_vision(spec: TensorSpec) -> bool:
    return ".visual." in spec.hf_name


def _is_written(spec: TensorSpec, answers: tuple[int, int] | None) -> bool:
    """Not the vision tower, nor a head that is tied, nor the vocabulary head that the rank head's rows replace."""
    is_replaced = spec.module == "lm_head" and answers is not None
    return not _is_vision(spec) and spec.presence is not Presence.DUPLICATE and not is_replaced


def _name(spec: TensorSpec, inventory: Inventory) -> str:
    config = inventory.detection.config
    layers: Sequence[int] = ()
    if inventory.detection.architecture.is_vision:
        layers = section(config, "vision_config").get("deepstack_visual_indexes", ())
    gguf_name = gguf_name_of(spec.hf_name, layers)
    if gguf_name is None:
        raise ModelError(f"{spec.hf_name} {list(spec.shape)} has no place in llama.cpp's {config.get('model_type')}.")
    return gguf_name


def _planned(gguf_name: str, shape: tuple[int, ...], matrices: GgmlType, source: TensorSource) -> PlannedTensor:
    chosen = element_type(gguf_name, shape, matrices)
    elements = 1
    for size in shape:
        elements *= size
    return PlannedTensor(OutputTensor(gguf_name, chosen, shape, chosen.nbytes(elements)), source)


def _repacked(gguf_name: str, checkpoint: Checkpoint, weight: PackedWeight) -> Iterator[PlannedTensor]:
    rows, columns = weight.shape
    if columns % NVFP4.block:
        raise ModelError(
            f"{weight.packed.hf_name} [{rows}, {columns}]: GGUF packs {NVFP4.block} NVFP4 values together, "
            f"and {columns} columns are no multiple of that."
        )
    yield PlannedTensor(
        OutputTensor(gguf_name, NVFP4, weight.shape, NVFP4.nbytes(rows * columns)), Repacked(checkpoint, weight)
    )
    scale_name = gguf_name.removesuffix(".weight") + ".scale"
    yield PlannedTensor(OutputTensor(scale_name, F32, (1,), 4), GlobalScale(checkpoint, weight))


def _require_type(inventory: Inventory, file_type: FileType) -> None:
    if inventory.packed and file_type.matrices is not NVFP4:
        raise UsageError(
            f"The checkpoint is NVFP4; as {file_type.label} it would be larger and no better.",
            "Pass --outtype nvfp4, or convert the checkpoint that it was made from.",
        )
    if not inventory.packed and file_type.matrices is NVFP4:
        raise UsageError(
            "--outtype nvfp4 repacks an NVFP4 checkpoint; this one is not quantized.",
            "Run `qtool quantize` first and convert its output.",
        )


def _matrices(inventory: Inventory, file_type: FileType) -> GgmlType:
    """What unpacked matrices become; beside NVFP4 weights they stay as they are."""
    if file_type.matrices is not NVFP4:
        return file_type.matrices
    embedding = next(info for spec, info in inventory.tensors.items() if spec.module.endswith("embed_tokens"))
    return next(each for each in GGML_TYPES.values() if each.name == embedding.dtype)


def require_rankable(detection: Detection) -> None:
    """Raise ModelError for the forms whose head a GGUF file cannot carry."""
    if detection.task is Task.RERANK and detection.architecture.head != "lm_head":
        raise ModelError(
            f"{detection.architecture.name} ranks by a `score` head, whose prompt and labels nothing declares.",
            "Convert the original checkpoint, which ranks by its yes and no tokens.",
        )
