"""Which tensor of the artefact is to be compared with which of the reference.

Rule: only tensors that both have, in the same shape; what is missing or misshapen is the structure stage's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from qtool.arch.detect import Detection, detect
from qtool.arch.spec import Presence
from qtool.checkpoint.reader import Checkpoint, open_checkpoint
from qtool.comparison.sides import GgufFiles, GgufSide, Planned, plan_conversion, read_side
from qtool.comparison.weight_stores import InGguf, Packed, Plain, Stored
from qtool.convert.sources import Frame, Rows, TensorSource, Whole
from qtool.formats.floats import FLOAT_FORMATS, Float32
from qtool.formats.ggml import F32, NVFP4
from qtool.inspection.checkpoint_model import CheckpointModel
from qtool.inventory.packed import is_quantized, packed_weights


@dataclass(frozen=True)
class TensorPair:
    """One tensor: `name` as the artefact's format calls it, what the reference has, and what the artefact stores."""

    name: str
    shape: tuple[int, ...]
    source: TensorSource
    source_format: str
    stored: Stored

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def expected(self) -> Iterator[tuple[int, Float32]]:
        """The reference's values, run by run, each with the place of its first."""
        for start, _, encode in self.source.pieces(F32):
            yield start // F32.block_bytes, encode().view(np.float32)


def checkpoint_pairs(folder: Path, reference: Checkpoint, expected: Detection) -> list[TensorPair]:
    """The tensors of a checkpoint's folder, in the reference's order."""
    checkpoint = open_checkpoint(folder)
    mine = CheckpointModel(checkpoint, detect(folder, expected.task), str(folder), ())
    theirs = CheckpointModel(reference, expected, "", ())
    packed = packed_weights(checkpoint) if is_quantized(checkpoint.config) else {}
    pairs = []
    for name, info in theirs.weights.items():
        stored = mine.weights.get(name)
        if stored is None or theirs.specs[name].presence is Presence.DUPLICATE:
            continue
        is_packed = stored.hf_name in packed
        if not is_packed and (stored.dtype not in FLOAT_FORMATS or stored.shape != info.shape):
            continue
        found = Packed(checkpoint, packed[stored.hf_name]) if is_packed else Plain(checkpoint, stored)
        if not is_packed or packed[stored.hf_name].shape == info.shape:
            pairs.append(TensorPair(name, info.shape, Whole(reference, info), info.dtype, found))
    return pairs


def gguf_pairs(files: GgufFiles, reference: Path, detection: Detection) -> list[TensorPair]:
    """The tensors of the GGUF files, as converting the reference orders them."""
    is_vision = detection.architecture.is_vision
    language, projector = plan_conversion(reference, detection.task, projector=is_vision and bool(files.projector))
    pairs = list(_file_pairs(read_side(files.language), language))
    if projector and files.projector:
        pairs += _file_pairs(read_side(files.projector), projector)
    return pairs


def _file_pairs(side: GgufSide, planned: Planned) -> Iterator[TensorPair]:
    for tensor in planned.file.tensors:
        name, shape, source = tensor.output.gguf_name, tensor.output.shape, tensor.source
        if name in side.tensors and side.tensors[name][1].shape == shape and isinstance(source, Whole | Rows | Frame):
            yield TensorPair(name, shape, source, source.info.dtype, _in_gguf(side, name))


def _in_gguf(side: GgufSide, name: str) -> InGguf:
    path, tensor = side.tensors[name]
    scale = side.tensors.get(name.removesuffix(".weight") + ".scale")
    if tensor.type is not NVFP4 or scale is None or scale[1].type is not F32:
        return InGguf(path, tensor)
    return InGguf(path, tensor, np.fromfile(scale[0], "<f4", 1, offset=scale[1].offset)[0])
