"""Which tensor of the artefact is compared with which of the reference, and what was measured of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import PurePath
from typing import Final

import numpy as np
from typing_extensions import override

from qtool.arch.spec import Presence
from qtool.artefact import CheckpointArtefact, GgufArtefact
from qtool.checks.checkpoint_model import CheckpointModel
from qtool.checks.fitted import FAR_BLOCKS, ROW_BOUND, Proof, Standing
from qtool.checks.gguf_reference import fused_parts
from qtool.checks.reference import Planned, Reference
from qtool.checks.rounding import Misfits, bound, coded_misfits, is_exact, misfits, unit, units
from qtool.export.gguf_plan import take_inventory
from qtool.export.sources import Frame, Rows, Whole, float32_runs
from qtool.export.tensor_writer import TensorSource
from qtool.formats.floats import FLOAT_FORMATS, U8, Float32
from qtool.formats.ggml import F32, NVFP4
from qtool.formats.nvfp4 import BLOCK
from qtool.formats.nvfp4_kernels import dequantize, judge_blocks
from qtool.storage.checkpoint import Checkpoint, TensorInfo
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import OUTPUT, GgufModel, decode, scale_of
from qtool.storage.packed import PackedWeight, is_quantized, packed_weights, read_global_scale

# The weights of an artefact, tensor by tensor, as float32, from whatever they are stored as. Any run of whole blocks
# can be read by itself, so that memory does not grow with the model.


class WeightStore(ABC):
    """One tensor of an artefact; `format` names its type, such as BF16, NVFP4 or Q4_K, and `file` the file it lies in."""

    format: str
    file: str

    @abstractmethod
    def values(self, start: int, count: int) -> Float32:
        """`count` values from `start` on, both multiples of the block. Raises NotImplementedError for an unknown type."""

    @abstractmethod
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, Misfits]:
        """The values beside `expected`, and what among them no rounding of that (a `source`) gives."""


class Plain(WeightStore):
    """An unquantized tensor of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo) -> None:
        self.format, self.file = info.dtype, info.file.name
        self._checkpoint, self._info = checkpoint, info

    @override
    def values(self, start: int, count: int) -> Float32:
        element = FLOAT_FORMATS[self._info.dtype]
        data = np.empty(count * element.itemsize, np.uint8)
        self._checkpoint.read_into(self._info, start * element.itemsize, data)
        return element.widen(data.view(element.bits_dtype))

    @override
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, Misfits]:
        found = self.values(start, expected.size)
        return found, misfits(self.format, source, expected, found)


@dataclass(frozen=True)
class Blocks:
    """The codes of a run of NVFP4 blocks: two values a byte, one E4M3 scale a block, and the global scale."""

    packed: U8
    block_scales: U8
    scale: np.float32

    def values(self) -> Float32:
        """The float32 weights."""
        return dequantize(self.packed.reshape(1, -1), self.block_scales, self.scale).reshape(-1)

    def compare(self, expected: Float32) -> tuple[Float32, Misfits]:
        """The weights, and what among them no rounding of `expected` gives."""
        return self.values(), Misfits(*judge_blocks(expected, self.packed, self.block_scales, self.scale))


class Nvfp4Store(WeightStore):
    """A tensor of NVFP4 blocks, wherever it is stored. They are rounded alike whatever the source's type."""

    format = "NVFP4"

    @abstractmethod
    def blocks(self, start: int, count: int) -> Blocks:
        """The codes of `count` values from `start` on, in ModelOpt's order."""

    @override
    def values(self, start: int, count: int) -> Float32:
        return self.blocks(start, count).values()

    @override
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, Misfits]:
        return self.blocks(start, expected.size).compare(expected)


class Packed(Nvfp4Store):
    """An NVFP4 weight of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, weight: PackedWeight) -> None:
        self.file = weight.packed.file.name
        self._checkpoint, self._weight = checkpoint, weight

    @cached_property
    def _scale(self) -> np.float32:
        return read_global_scale(self._checkpoint, self._weight)

    @override
    def blocks(self, start: int, count: int) -> Blocks:
        packed, scales = np.empty(count // 2, np.uint8), np.empty(count // BLOCK, np.uint8)
        self._checkpoint.read_into(self._weight.packed, start // 2, packed)
        self._checkpoint.read_into(self._weight.block_scales, start // BLOCK, scales)
        return Blocks(packed, scales, self._scale)


class Nvfp4InGguf(Nvfp4Store):
    """An NVFP4 tensor of a GGUF file with the scale that llama.cpp multiplies its product with, 1 where there is none."""

    def __init__(self, model: GgufModel, tensor: GgufTensor) -> None:
        self.file = PurePath(model.part_of[tensor.gguf_name]).name
        self._model, self._tensor = model, tensor

    @cached_property
    def _scale(self) -> np.float32:
        return _scale_beside(self._model, self._tensor)

    @override
    def blocks(self, start: int, count: int) -> Blocks:
        kind = self._tensor.type
        groups = self._model.read(self._tensor, kind.nbytes(start), kind.nbytes(count)).reshape(-1, 36)
        halves = groups[:, 4:].reshape(-1, 8)  # byte j holds the elements j and j + 8
        low, high = halves & 15, halves >> 4
        packed = np.concatenate([low[:, ::2] | low[:, 1::2] << 4, high[:, ::2] | high[:, 1::2] << 4], axis=1)
        return Blocks(packed.reshape(-1), np.ascontiguousarray(groups[:, :4]).reshape(-1), self._scale)


class InGguf(WeightStore):
    """A tensor of a GGUF file that is not NVFP4, times the scale beside it, which llama.cpp applies to any type."""

    def __init__(self, model: GgufModel, tensor: GgufTensor) -> None:
        self.format = tensor.type.name
        self.file = PurePath(model.part_of[tensor.gguf_name]).name
        self._model, self._tensor = model, tensor

    @cached_property
    def _scale(self) -> np.float32:
        return _scale_beside(self._model, self._tensor)

    def _stored(self, start: int, count: int) -> U8:
        kind = self._tensor.type
        return self._model.read(self._tensor, kind.nbytes(start), kind.nbytes(count))

    @override
    def values(self, start: int, count: int) -> Float32:
        found = decode(self._stored(start, count).reshape(1, -1), self._tensor.type).reshape(-1)
        return found if self._scale == 1 else found * self._scale

    @override
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, Misfits]:
        kind, stored = self._tensor.type, self._stored(start, expected.size)
        found = decode(stored.reshape(1, -1), kind).reshape(-1)
        if self._scale != 1:
            return found * self._scale, Misfits()
        return found, misfits(kind.name, source, expected, found) + coded_misfits(kind, stored, expected, found)


def _scale_beside(model: GgufModel, tensor: GgufTensor) -> np.float32:
    scale = model.tensors.get(scale_of(tensor.gguf_name))
    if scale is None or scale.type is not F32 or not tensor.gguf_name.endswith(".weight"):
        return np.float32(1)
    return np.float32(model.read(scale, 0, 4).view("<f4")[0])


class Part(WeightStore):
    """Some rows of a larger tensor: q, k or v of a file that stores the three as one."""

    def __init__(self, whole: WeightStore, first: int) -> None:
        self.format, self.file = whole.format, whole.file
        self._whole, self._first = whole, first

    @override
    def values(self, start: int, count: int) -> Float32:
        return self._whole.values(self._first + start, count)

    @override
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, Misfits]:
        return self._whole.compare(self._first + start, expected, source)


class Nvfp4Part(Part, Nvfp4Store):
    """Likewise of an NVFP4 tensor."""

    def __init__(self, whole: Nvfp4Store, first: int) -> None:
        super().__init__(whole, first)
        self._blocks = whole.blocks

    @override
    def blocks(self, start: int, count: int) -> Blocks:
        return self._blocks(self._first + start, count)


# Which tensor of the artefact is compared with which of the reference: only those that both have, in the same shape. What
# is missing or has another shape is found by the structure stage.


@dataclass(frozen=True)
class TensorPair:
    """One tensor: `name` as the artefact's format calls it, what the reference has (as F32), and what the artefact stores."""

    name: str
    shape: tuple[int, ...]
    source: TensorSource
    source_format: str
    stored: WeightStore

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def expected(self) -> Iterator[tuple[int, Float32]]:
        """The reference's values, run by run, each with the place of its first."""
        return float32_runs(self.source)


def checkpoint_pairs(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> list[TensorPair]:
    """The tensors of a checkpoint, in the reference's order."""
    mine, theirs = CheckpointModel.of(artefact), CheckpointModel.of(reference)
    checkpoint = artefact.checkpoint
    packed = packed_weights(checkpoint) if is_quantized(checkpoint.config) else {}
    pairs = []
    for name, info in theirs.weights.items():
        stored = mine.weights.get(name)
        if stored is None or theirs.specs[name].presence is Presence.DUPLICATE:
            continue
        weight = packed.get(stored.hf_name)
        if weight is None and (stored.dtype not in FLOAT_FORMATS or stored.shape != info.shape):
            continue
        found = Plain(checkpoint, stored) if weight is None else Packed(checkpoint, weight)
        if weight is None or weight.shape == info.shape:
            source = Whole(reference.checkpoint, info, name, F32)
            pairs.append(TensorPair(name, info.shape, source, info.dtype, found))
    return pairs


def gguf_pairs(artefact: GgufArtefact, reference: Reference) -> list[TensorPair]:
    """The tensors of the GGUF files, as converting the reference orders them."""
    pairs = list(_file_pairs(artefact.model, reference.language))
    if OUTPUT in artefact.model.tensors and OUTPUT not in {pair.name for pair in pairs}:
        pairs += _head_pairs(artefact.model, reference)
    if artefact.projector is not None and reference.family.is_vision:
        pairs += _file_pairs(artefact.projector, reference.projector)
    return pairs


def _file_pairs(model: GgufModel, planned: Planned) -> Iterator[TensorPair]:
    merged = fused_parts(model, {each.output.gguf_name: each.output for each in planned.file.tensors})
    for each in planned.file.tensors:
        name, shape, source = each.output.gguf_name, each.output.shape, each.source
        if isinstance(source, Whole | Rows | Frame) and (stored := _stored(model, name, shape, merged)) is not None:
            yield TensorPair(name, shape, replace(source, target=F32), source.info.dtype, stored)


def _head_pairs(model: GgufModel, reference: Reference) -> Iterator[TensorPair]:
    """The head of all words where the file stores it though no score needs it: the rank head is compared with its rows."""
    inventory = take_inventory(reference.checkpoint, reference.detection)
    stored = _stored(model, OUTPUT, inventory.embedding.shape, {})
    if stored is not None:
        info = inventory.head
        yield TensorPair(OUTPUT, info.shape, Whole(reference.checkpoint, info, OUTPUT, F32), info.dtype, stored)


def _stored(
    model: GgufModel, name: str, shape: tuple[int, ...], merged: Mapping[str, tuple[str, int]]
) -> WeightStore | None:
    fused, first = merged.get(name, (name, 0))
    tensor = model.tensors.get(fused)
    if tensor is None or (tensor.shape != shape and (name not in merged or tensor.shape[1:] != shape[1:])):
        return None
    if name in merged and first + shape[0] > tensor.shape[0]:
        return None
    if tensor.type is NVFP4:
        packed = Nvfp4InGguf(model, tensor)
        return Nvfp4Part(packed, first * shape[-1]) if name in merged else packed
    whole = InGguf(model, tensor)
    return Part(whole, first * shape[-1]) if name in merged else whole


# What was measured of one tensor, and samples by which tensors are recognised. A sample is the beginning of a tensor; two
# tensors of one shape are the same if it agrees within the format's bound.

SAMPLE: Final = 1 << 16
_DAMAGED: Final = 0.05
"""Where fewer blocks are wrong, the rest is the reference's and bytes were damaged."""
_MARGIN: Final = 1.5


@dataclass(frozen=True)
class WeightError:
    """A tensor's relative error beside its bound, and how many values or blocks lost more than rounding can.

    Of NVFP4 that is not declared to be rounded to nearest also the error of the worst row, how many blocks are as far off as
    zeros (`far`), and how many rows are zeros. Weights that were fitted
    to data have their `proof`, or are `is_fitted`: judged by a bound, since nothing usable is recorded of them.
    """

    pair: TensorPair
    relative_error: float
    bound: float
    misfits: Misfits
    is_zero: bool = False
    proof: Proof | None = None
    is_fitted: bool = False
    worst_row: float = 0.0
    far: int = 0
    zero_rows: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with it."""
        if self.proof is not None and not self.is_fitted:
            return self.proof.standing is Standing.INTACT
        within = self.relative_error <= self.bound or is_exact(self.pair.stored.format, self.pair.source_format)
        return within and (self.is_even if self.is_fitted else not self.misfits.units)

    @property
    def is_even(self) -> bool:
        """Whether no row and hardly a block is further off than fitting weights to data takes them."""
        return not self.zero_rows and self.worst_row <= ROW_BOUND and self.far <= FAR_BLOCKS * self.total

    @property
    def is_finite(self) -> bool:
        """Whether it holds numbers only."""
        return isfinite(self.relative_error)

    @property
    def is_damaged(self) -> bool:
        """Whether a few blocks are wrong and the rest is right."""
        if self.proof is not None and not self.is_fitted:
            return self.proof.standing is Standing.DAMAGED and self.proof.is_local
        return 0 < self.wrong < max(_DAMAGED * self.total, 2) and not (self.is_fitted and self.is_even)

    @property
    def wrong(self) -> int:
        """How many values or blocks are not what rounding gives; of weights fitted to data, how many are far off."""
        return self.far if self.is_fitted else self.misfits.units

    @property
    def total(self) -> int:
        """How many values or blocks there are."""
        return units(self.pair.stored.format, self.pair.elements)

    @property
    def unit(self) -> str:
        """What is counted."""
        return unit(self.pair.stored.format)

    @cached_property
    def expected(self) -> Float32:
        """The beginning of the reference's tensor."""
        _, values = next(self.pair.expected())
        return values[:SAMPLE].copy()

    @cached_property
    def found(self) -> Float32:
        """The beginning of what is stored."""
        return self.pair.stored.values(0, self.expected.size)

    def matches(self, found: Float32, expected: Float32) -> bool:
        """Whether `found`, in this tensor's format, may stand for `expected`."""
        norm = float(np.linalg.norm(expected))
        allowed = _MARGIN * bound(self.pair.stored.format, self.pair.source_format, expected.size, norm)
        return norm > 0 and distance(found, expected) <= allowed


def distance(found: Float32, expected: Float32) -> float:
    """The relative (Frobenius) error."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))
