"""Which tensor of the artefact is compared with which of the reference, and what was measured of it."""

from __future__ import annotations

import re
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
from qtool.checks.reference import Planned, Reference
from qtool.export.sources import Frame, Rows, Whole, float32_runs
from qtool.export.tensor_writer import TensorSource
from qtool.formats.floats import FLOAT_FORMATS, U8, Float32
from qtool.formats.ggml import F32, NVFP4
from qtool.formats.nvfp4 import BLOCK
from qtool.formats.nvfp4_kernels import dequantize, misrounded_blocks
from qtool.storage.checkpoint import Checkpoint, TensorInfo
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import GgufModel, decode, scale_of
from qtool.storage.packed import PackedWeight, is_quantized, packed_weights, read_global_scale

# What each number format may lose, and which values or blocks lost more. A bound is derived from the format's rounding,
# not fitted, so that no sound artefact exceeds it:
# - F16 and BF16 round to nearest: 2^-11 and 2^-8 of a value, and half the smallest subnormal.
# - Q8_0: half a step of amax/127 in each block of 32, and the scale is an F16. Worst is a block of one large value and 31
#   at half a step: sqrt(31)/254 · 1.125 = 0.025.
# - NVFP4: worst is a block whose 15 smaller values lie in the middle of the widest gap (4 to 6) under a scale that E4M3
#   rounded down: sqrt((15 + 0.125) / (15·25 + 31.9)) = 0.193; normal weights lose 0.09 to 0.10.
# - A type that llama.cpp quantizes has no such bound: 3.2 / 2^bits, two and a half times what the demo reranker loses
#   (Q6_K 0.019, Q5_K 0.038, Q4_K 0.074, IQ4_XS 0.079).

_NVFP4: Final = 0.2
_Q8_0: Final = 0.025
_RELATIVE: Final[Mapping[str, float]] = {"F16": 2.0**-11, "BF16": 2.0**-8}
_SUBNORMAL: Final[Mapping[str, float]] = {"F16": 2.0**-25, "BF16": 2.0**-134}
_EXACT: Final[Mapping[str, tuple[str, ...]]] = {"F32": ("BF16", "F16", "F32"), "F16": ("F16",), "BF16": ("BF16",)}
"""By stored type: the types that it holds without loss."""

_Q8_BLOCK: Final = 32
_Q8_STEP: Final = (0.5 + 127 * 2.0**-11) * (1 + 1e-5) / 127
_Q8_SUBNORMAL: Final = 127 * 2.0**-25  # the scale is an F16, too
_BITS: Final = re.compile(r"I?Q(\d)|TQ(\d)|MXFP(\d)")


def is_exact(stored: str, source: str) -> bool:
    """Whether every value of the type `source` survives in the type `stored`."""
    return source in _EXACT.get(stored, ())


def bound(stored: str, source: str, count: int, norm: float) -> float:
    """The largest relative (Frobenius) error of `count` values whose norm is `norm`."""
    if is_exact(stored, source) or norm == 0:
        return 0.0
    small = np.sqrt(count) / norm
    if stored in _RELATIVE:
        return float(_RELATIVE[stored] + _SUBNORMAL[stored] * small)
    if stored == "Q8_0":
        return float(_Q8_0 + _Q8_SUBNORMAL * small)
    if stored == "NVFP4":
        return _NVFP4
    match = _BITS.match(stored)
    bits = int(next(filter(None, match.groups()))) if match else 1
    return 3.2 / float(2**bits)


def unit(stored: str) -> str:
    """What is counted: single values, or blocks where a format has them."""
    return "blocks" if stored in ("NVFP4", "Q8_0") else "values"


def units(stored: str, count: int) -> int:
    """How many there are among `count` values."""
    return count // {"NVFP4": 16, "Q8_0": _Q8_BLOCK}.get(stored, 1)


def misfits(stored: str, source: str, expected: Float32, found: Float32) -> int:
    """How many values or blocks lost more than rounding can; NVFP4 has its own check, llama.cpp's types have none."""
    error = np.abs(found - expected)
    if is_exact(stored, source):
        return int(np.count_nonzero(~(error == 0)))
    if stored in _RELATIVE:
        allowed = _RELATIVE[stored] * np.abs(expected) + _SUBNORMAL[stored]
        return int(np.count_nonzero(~(error <= allowed)))
    if stored == "Q8_0":
        blocks = np.abs(expected).reshape(-1, _Q8_BLOCK).max(axis=1)
        worst = error.reshape(-1, _Q8_BLOCK).max(axis=1)
        return int(np.count_nonzero(~(worst <= blocks * _Q8_STEP + _Q8_SUBNORMAL)))
    return 0


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
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
        """The values beside `expected`, and how many of them, or blocks, are not what rounding that (a `source`) gives."""


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
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
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

    def compare(self, expected: Float32) -> tuple[Float32, int]:
        """The weights, and how many blocks are not what rounding `expected` gives."""
        return self.values(), misrounded_blocks(expected, self.packed, self.block_scales, self.scale)


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
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
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
        scale = self._model.tensors.get(scale_of(self._tensor.gguf_name))
        if scale is None or scale.type is not F32:
            return np.float32(1)
        return np.float32(self._model.read(scale, 0, 4).view("<f4")[0])

    @override
    def blocks(self, start: int, count: int) -> Blocks:
        kind = self._tensor.type
        groups = self._model.read(self._tensor, kind.nbytes(start), kind.nbytes(count)).reshape(-1, 36)
        halves = groups[:, 4:].reshape(-1, 8)  # byte j holds the elements j and j + 8
        low, high = halves & 15, halves >> 4
        packed = np.concatenate([low[:, ::2] | low[:, 1::2] << 4, high[:, ::2] | high[:, 1::2] << 4], axis=1)
        return Blocks(packed.reshape(-1), np.ascontiguousarray(groups[:, :4]).reshape(-1), self._scale)


class InGguf(WeightStore):
    """A tensor of a GGUF file that is not NVFP4."""

    def __init__(self, model: GgufModel, tensor: GgufTensor) -> None:
        self.format = tensor.type.name
        self.file = PurePath(model.part_of[tensor.gguf_name]).name
        self._model, self._tensor = model, tensor

    @override
    def values(self, start: int, count: int) -> Float32:
        kind = self._tensor.type
        data = self._model.read(self._tensor, kind.nbytes(start), kind.nbytes(count))
        return decode(data.reshape(1, -1), kind).reshape(-1)

    @override
    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
        found = self.values(start, expected.size)
        return found, misfits(self.format, source, expected, found)


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
    if artefact.projector is not None and reference.family.is_vision:
        pairs += _file_pairs(artefact.projector, reference.projector)
    return pairs


def _file_pairs(model: GgufModel, planned: Planned) -> Iterator[TensorPair]:
    for each in planned.file.tensors:
        name, shape, source = each.output.gguf_name, each.output.shape, each.source
        tensor = model.tensors.get(name)
        if tensor is not None and tensor.shape == shape and isinstance(source, Whole | Rows | Frame):
            stored = Nvfp4InGguf(model, tensor) if tensor.type is NVFP4 else InGguf(model, tensor)
            yield TensorPair(name, shape, replace(source, target=F32), source.info.dtype, stored)


# What was measured of one tensor, and samples by which tensors are recognised. A sample is the beginning of a tensor; two
# tensors of one shape are the same if it agrees within the format's bound.

SAMPLE: Final = 1 << 16
_DAMAGED: Final = 0.05
"""Where fewer blocks are wrong, the rest is the reference's and bytes were damaged."""
_MARGIN: Final = 1.5


@dataclass(frozen=True)
class WeightError:
    """A tensor's relative error beside its bound, and how many values or blocks lost more than rounding can."""

    pair: TensorPair
    relative_error: float
    bound: float
    misfits: int
    is_zero: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.relative_error <= self.bound and not self.misfits

    @property
    def is_finite(self) -> bool:
        """Whether it holds numbers only."""
        return isfinite(self.relative_error)

    @property
    def is_damaged(self) -> bool:
        """Whether a few blocks are wrong and the rest is right."""
        return 0 < self.misfits < max(_DAMAGED * self.total, 2)

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
