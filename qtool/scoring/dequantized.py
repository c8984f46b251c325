"""The weights of an NVFP4 W4A16 artefact (ModelOpt layout), dequantized from the bytes that users get.

Rule: as a W4A16 kernel sees them. vLLM's Marlin kernel multiplies E2M1 by its E4M3 block scale, which a bf16 holds
exactly (1 + 3 mantissa bits), accumulates in float32 and applies the float32 global scale there; so the weight is the
float32 product of the three and is not rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qtool.inventory.packed import PackedWeight, packed_weights, read_global_scale
from qtool.scoring.weights import read_float32

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.scoring.weights import Float32


def dequantized_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Float32]]:
    """(hf_name, weight), one at a time; packed weights are rebuilt from their three tensors."""
    packed = packed_weights(checkpoint)
    scales = {scale.hf_name for weight in packed.values() for scale in (weight.block_scales, weight.global_scale)}
    for hf_name in checkpoint.tensors:
        if hf_name not in scales:
            weight = packed.get(hf_name)
            yield hf_name, read_float32(checkpoint, hf_name) if weight is None else _dequantized(checkpoint, weight)


def _dequantized(checkpoint: Checkpoint, weight: PackedWeight) -> Float32:
    from qtool.formats.nvfp4_kernels import dequantize  # compiled; loading that takes half a second

    block_scales = checkpoint.read(weight.block_scales.hf_name)
    return dequantize(checkpoint.read(weight.packed.hf_name), block_scales, read_global_scale(checkpoint, weight))
