"""The NVFP4 W4A16 tensors of a checkpoint in ModelOpt's layout.

What engines load without an error (a missing scale, one of another type) is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qtool.arch.spec import section
from qtool.errors import ModelError
from qtool.formats.nvfp4 import BLOCK
from qtool.storage.checkpoint import Checkpoint, TensorInfo

ALGORITHM: Final = "W4A16_NVFP4"
PACKED: Final = "U8"

# What follows the module's name in the names of the tensors beside a packed weight.
WEIGHT: Final = ".weight"
BLOCK_SCALE: Final = ".weight_scale"
GLOBAL_SCALE: Final = ".weight_scale_2"
INPUT_SCALE: Final = ".input_scale"


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight [out, in/2] with its block scales [out, in/16] and its global scale."""

    packed: TensorInfo
    block_scales: TensorInfo
    global_scale: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that it stands for."""
        rows, columns = self.packed.shape
        return rows, 2 * columns


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether config.json declares quantized weights."""
    return "quantization_config" in config


def packed_weights(checkpoint: Checkpoint) -> dict[str, PackedWeight]:
    """The packed weights of an NVFP4 checkpoint by their names; raises ModelError where one cannot be read."""
    _check_algorithm(checkpoint.config)
    names = [name for name, info in checkpoint.tensors.items() if info.dtype == PACKED]
    return {name: _packed_weight(checkpoint, name) for name in names}


def read_global_scale(checkpoint: Checkpoint, weight: PackedWeight) -> np.float32:
    """`weight_scale_2`."""
    return np.float32(checkpoint.read(weight.global_scale.hf_name).reshape(())[()])


def _packed_weight(checkpoint: Checkpoint, hf_name: str) -> PackedWeight:
    packed = checkpoint.tensors[hf_name]
    if len(packed.shape) != 2 or packed.shape[1] * 2 % BLOCK:
        raise ModelError(f"{hf_name} has shape {list(packed.shape)}; packed weights are [out, in / 2].")
    blocks = (packed.shape[0], packed.shape[1] * 2 // BLOCK)
    block_scales = _scale(checkpoint, hf_name, BLOCK_SCALE, "F8_E4M3", blocks)
    return PackedWeight(packed, block_scales, _scale(checkpoint, hf_name, GLOBAL_SCALE, "F32", ()))


def _scale(checkpoint: Checkpoint, hf_name: str, suffix: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    name = hf_name.removesuffix(WEIGHT) + suffix
    found = checkpoint.tensors.get(name)
    if found is None:
        raise ModelError(f"{name} is missing: the packed weight cannot be read without it.")
    if found.dtype != dtype:
        raise ModelError(f"{found.hf_name} is stored as {found.dtype}, expected {dtype}.")
    if found.shape not in (shape, shape or (1,)):  # other exporters store a scalar as one of [1]
        weight = list(checkpoint.tensors[hf_name].shape)
        raise ModelError(
            f"{found.hf_name} has shape {list(found.shape)}, expected {list(shape)} for its weight {weight}."
        )
    return found


def _check_algorithm(config: Mapping[str, Any]) -> None:
    declared = section(config, "quantization_config")
    algorithm = declared.get("quant_algo")
    if algorithm != ALGORITHM:
        raise ModelError(
            f"config.json declares the quantization {algorithm!r} ({declared.get('quant_method')}).",
            f"Pass a checkpoint in {ALGORITHM}, or an unquantized one.",
        )
