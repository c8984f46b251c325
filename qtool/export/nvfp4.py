"""NVFP4 as a source of tensors: a fused group is measured, gets its global scale, and is then encoded block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from qtool.errors import ModelError, UsageError
from qtool.export.quantize_plan import Action, PlannedTensor, QuantizationPlan
from qtool.export.tensor_writer import (
    Encoded,
    TensorChunk,
    TensorRead,
    TensorSource,
    checked_largest,
    chunk_ranges,
    float_format_of,
    read_bits,
)
from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4 import (
    BLOCK,
    Algorithm,
    EncodeTables,
    encode_tables,
    global_scale,
    is_usable_scale,
    largest_block_scale,
)
from qtool.formats.nvfp4_kernels import encode
from qtool.progress import Advance
from qtool.storage.checkpoint import Checkpoint, TensorInfo
from qtool.storage.packed import BLOCK_SCALE, GLOBAL_SCALE


class Nvfp4Group(TensorSource):
    """The weights that share one global scale, since engines merge them into one product.

    Each is read twice: for the largest magnitude of the group, then to be encoded.
    """

    def __init__(self, checkpoint: Checkpoint, members: Sequence[PlannedTensor], algorithm: Algorithm = "max") -> None:
        self._checkpoint = checkpoint
        self._algorithm = algorithm
        self._members = members
        self._maxima: list[int] = []
        self._sums: dict[str, dict[int, tuple[float, float]]] = {member.spec.hf_name: {} for member in members}

    @property
    @override
    def work_bytes(self) -> int:
        return 2 * sum(member.source.nbytes for member in self._members)

    @override
    def reads(self) -> Iterator[TensorRead]:
        return (TensorRead.whole(member.source) for member in (*self._members, *self._members))

    @override
    def measurements(self) -> Iterator[TensorChunk]:
        for member in self._members:
            for start, nbytes in chunk_ranges(member.source.nbytes):
                yield TensorChunk(nbytes, partial(self._measure, member.source, start, nbytes))

    def _measure(self, info: TensorInfo, start: int, nbytes: int) -> Sequence[Encoded]:
        bits = read_bits(self._checkpoint, info, start, nbytes)
        self._maxima.append(checked_largest(self._checkpoint, info, bits))
        return ()

    def global_scale(self) -> np.float32:
        """`weight_scale_2` of the measured group; ModelError where there is none that works."""
        amax = self._largest_magnitude()
        scale = global_scale(amax, largest_block_scale(self._algorithm))
        if not is_usable_scale(scale):
            raise ModelError(
                f"{self._members[0].spec.fused_group}: the largest magnitude is {amax:g}, for which ModelOpt writes NaN scales.",
                "The layer was never trained or not saved. Quantize a checkpoint with its weights.",
            )
        return scale

    def _largest_magnitude(self) -> np.float32:
        element = float_format_of(self._members[0].source)
        return np.float32(element.widen(np.array([max(self._maxima, default=0)], element.bits_dtype))[0])

    def _search(self, weights: Float32, block_scales: U8) -> None:
        """Write the block scales that the algorithm finds."""
        from qtool.formats.nvfp4_search_kernels import search_four_over_six, search_mse

        search = search_mse if self._algorithm == "mse" else search_four_over_six
        search(weights, self._largest_magnitude(), block_scales)

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        # Chunks and rows are whole numbers of blocks, so that no block is cut.
        tables = encode_tables(self.global_scale(), float_format_of(self._members[0].source))
        yield TensorChunk(0, partial(self._encode_global_scales, tables.scale))
        for member in self._members:
            for start, nbytes in chunk_ranges(member.source.nbytes):
                yield TensorChunk(nbytes, partial(self._encode, tables, member, start, nbytes))

    def _encode_global_scales(self, scale: np.float32) -> Sequence[Encoded]:
        data = np.array([scale], "<f4").view(np.uint8)
        return [Encoded(f"{member.spec.module}{GLOBAL_SCALE}", 0, data) for member in self._members]

    def _encode(self, tables: EncodeTables, member: PlannedTensor, start: int, nbytes: int) -> Sequence[Encoded]:
        bits = read_bits(self._checkpoint, member.source, start, nbytes)
        packed, block_scales = np.empty(bits.size // 2, np.uint8), np.empty(bits.size // BLOCK, np.uint8)
        self._sums[member.spec.hf_name][start] = encode(
            bits, tables, packed, block_scales, None if self._algorithm == "max" else self._search
        )
        first = start // bits.itemsize
        return (
            Encoded(member.spec.hf_name, first // 2, packed),
            Encoded(f"{member.spec.module}{BLOCK_SCALE}", first // BLOCK, block_scales),
        )

    def relative_errors(self) -> Mapping[str, float]:
        """|w - q| / |w| (Frobenius) of each encoded weight by its hf_name."""
        return {hf_name: relative_error(sums[start] for start in sorted(sums)) for hf_name, sums in self._sums.items()}


def relative_error(sums: Iterable[tuple[float, float]]) -> float:
    """|w - q| / |w| from the sums of squared error and of squared weight of a tensor's chunks, in order."""
    error = power = 0.0
    for chunk_error, chunk_power in sums:
        error, power = error + chunk_error, power + chunk_power
    return float(np.sqrt(error / power)) if power else 0.0


class Rounding(Protocol):
    """Weights that were rounded before, by calibration; all names are canonical hf_names."""

    @property
    def relative_errors(self) -> Mapping[str, float]:
        """|w - q| / |w| (Frobenius) of each weight."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the manifest says about it: `calibration`, equal in equal artefacts, and `run`, which is not."""

    def tensor_facts(self, hf_name: str) -> Mapping[str, Any]:
        """What the manifest says about one weight."""

    def global_scale(self, hf_name: str) -> np.float32:
        """`weight_scale_2`."""

    def arrays(self, hf_name: str) -> tuple[U8, U8]:
        """The packed codes [rows, in/2] and the block scales [rows, in/16]."""


@dataclass(frozen=True)
class RoundedTensor(TensorSource):
    """A weight whose codes and scales are known."""

    rounding: Rounding
    member: PlannedTensor

    @property
    @override
    def work_bytes(self) -> int:
        return self.member.source.nbytes

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        yield TensorChunk(self.work_bytes, self._encode)

    def _encode(self) -> Sequence[Encoded]:
        hf_name, module = self.member.spec.hf_name, self.member.spec.module
        packed, block_scales = self.rounding.arrays(hf_name)
        scale = np.array([self.rounding.global_scale(hf_name)], "<f4").view(np.uint8)
        return (
            Encoded(f"{module}{GLOBAL_SCALE}", 0, scale),
            Encoded(hf_name, 0, packed.reshape(-1)),
            Encoded(f"{module}{BLOCK_SCALE}", 0, block_scales.reshape(-1)),
        )


@dataclass(frozen=True)
class CopiedTensor(TensorSource):
    """A tensor whose bytes stay, under the name `output`."""

    checkpoint: Checkpoint
    info: TensorInfo
    output: str

    @property
    @override
    def work_bytes(self) -> int:
        return self.info.nbytes

    @override
    def reads(self) -> Iterator[TensorRead]:
        yield TensorRead.whole(self.info)

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        for start, nbytes in chunk_ranges(self.info.nbytes):
            yield TensorChunk(nbytes, partial(self._copy, start, nbytes))

    def _copy(self, start: int, nbytes: int) -> Sequence[Encoded]:
        bits = read_bits(self.checkpoint, self.info, start, nbytes)
        checked_largest(self.checkpoint, self.info, bits)
        return (Encoded(self.output, start, bits.view(np.uint8)),)


def quantization_sources(
    checkpoint: Checkpoint, plan: QuantizationPlan, rounding: Rounding | None = None
) -> list[TensorSource]:
    """Where the plan's output tensors come from, in its order; a fused group stands where its first member does."""
    groups = dict(plan.groups)
    sources: list[TensorSource] = []
    for tensor in plan.tensors:
        if tensor.action is Action.COPY:
            sources.append(CopiedTensor(checkpoint, tensor.source, tensor.spec.hf_name))
        elif tensor.action is Action.QUANTIZE and rounding is not None:
            sources.append(RoundedTensor(rounding, tensor))
        elif tensor.action is Action.QUANTIZE and (members := groups.pop(tensor.spec.fused_group, None)):
            sources.append(Nvfp4Group(checkpoint, members, _algorithm(plan)))
    return sources


def _algorithm(plan: QuantizationPlan) -> Algorithm:
    if plan.recipe.algorithm == "calibrated":
        raise UsageError(
            f"Recipe {plan.recipe.name} fits weights to data; without the data its weights cannot be made.",
            "Run qtool quantize with the same --data and --effort.",
        )
    return plan.recipe.algorithm


def relative_errors(sources: Iterable[TensorSource]) -> Mapping[str, float]:
    """|w - q| / |w| (Frobenius) of each quantized weight by its hf_name, once all are written."""
    groups = [source for source in sources if isinstance(source, Nvfp4Group)]
    return {hf_name: error for group in groups for hf_name, error in group.relative_errors().items()}


def check_weights(sources: Sequence[TensorSource], advance: Advance) -> None:
    """Read every weight once and raise the ModelError that `write_tensors` would, for a backend that does not check."""
    for source in sources:
        for chunk in source.measurements() if isinstance(source, Nvfp4Group) else source.chunks():
            chunk.encode()
            advance(chunk.nbytes)
        if isinstance(source, Nvfp4Group):
            source.global_scale()
