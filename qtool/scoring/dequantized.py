"""The weights of an NVFP4 W4A16 artefact (ModelOpt layout), dequantized from the bytes that users get.

Rule: as a W4A16 kernel sees them. vLLM's Marlin kernel multiplies E2M1 by its E4M3 block scale, which a bf16 holds
exactly (1 + 3 mantissa bits), accumulates in float32 and applies the float32 global scale there; so the weight is the
float32 product of the three and is not rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qtool.arch.spec import section
from qtool.errors import ModelError
from qtool.formats import nvfp4, nvfp4_kernels
from qtool.scoring.weights import read_float32

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint, TensorInfo
    from qtool.scoring.weights import Float32

ALGORITHM: Final = "W4A16_NVFP4"
_PACKED: Final = "U8"
_BLOCK_SCALE: Final = "_scale"
_GLOBAL_SCALE: Final = "_scale_2"


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether config.json declares quantized weights."""
    return "quantization_config" in config


def dequantized_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Float32]]:
    """(hf_name, weight), one at a time; packed weights are rebuilt from their three tensors."""
    _check_algorithm(checkpoint.config)
    packed = [name for name, info in checkpoint.tensors.items() if info.dtype == _PACKED]
    scales = {name + suffix for name in packed for suffix in (_BLOCK_SCALE, _GLOBAL_SCALE)}
    _check_scales(checkpoint, scales)
    for hf_name in checkpoint.tensors:
        if hf_name not in scales:
            yield hf_name, _weight(checkpoint, hf_name)


def _weight(checkpoint: Checkpoint, hf_name: str) -> Float32:
    if checkpoint.tensors[hf_name].dtype != _PACKED:
        return read_float32(checkpoint, hf_name)
    _check_shapes(*(checkpoint.tensors[hf_name + suffix] for suffix in ("", _BLOCK_SCALE, _GLOBAL_SCALE)))
    global_scale = checkpoint.read(hf_name + _GLOBAL_SCALE).reshape(())
    return nvfp4_kernels.dequantize(
        checkpoint.read(hf_name), checkpoint.read(hf_name + _BLOCK_SCALE), np.float32(global_scale)
    )


def _check_shapes(packed: TensorInfo, block_scales: TensorInfo, global_scale: TensorInfo) -> None:
    if len(packed.shape) != 2 or packed.shape[1] * 2 % nvfp4.BLOCK:
        raise ModelError(f"{packed.hf_name} has shape {list(packed.shape)}; packed weights are [out, in / 2].")
    blocks = [packed.shape[0], packed.shape[1] * 2 // nvfp4.BLOCK]
    for found, expected in ((block_scales, blocks), (global_scale, [])):
        if list(found.shape) != expected:
            raise ModelError(
                f"{found.hf_name} has shape {list(found.shape)}, its weight {list(packed.shape)} needs {expected}."
            )


def _check_algorithm(config: Mapping[str, Any]) -> None:
    declared = section(config, "quantization_config")
    algorithm = declared.get("quant_algo")
    if algorithm != ALGORITHM:
        raise ModelError(
            f"config.json declares the quantization {algorithm!r} ({declared.get('quant_method')}).",
            f"qtool dequantizes {ALGORITHM}.",
        )


def _check_scales(checkpoint: Checkpoint, scales: set[str]) -> None:
    for name in sorted(scales):
        expected = "F8_E4M3" if name.endswith(_BLOCK_SCALE) else "F32"
        found = checkpoint.tensors.get(name)
        if found is None:
            raise ModelError(f"{name} is missing: the packed weight cannot be read without it.")
        if found.dtype != expected:
            raise ModelError(f"{name} is stored as {found.dtype}, NVFP4 needs {expected}.")
