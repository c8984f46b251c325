"""A checkpoint's weights as float32, whatever they are stored as.

Rule: a stored number is widened exactly or dequantized by its format; nothing else happens to it on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qtool.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.checkpoint.reader import Checkpoint

    Float32 = NDArray[np.float32]


def source_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Float32]]:
    """(hf_name, weight) of an unquantized checkpoint, one tensor at a time."""
    for hf_name in checkpoint.tensors:
        yield hf_name, read_float32(checkpoint, hf_name)


def read_float32(checkpoint: Checkpoint, hf_name: str) -> Float32:
    """One BF16, F16 or F32 tensor, widened into memory of its own."""
    dtype = checkpoint.tensors[hf_name].dtype
    stored = checkpoint.read(hf_name)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F16", "F32"):
        return np.array(stored, dtype=np.float32)
    raise ModelError(
        f"{hf_name} is stored as {dtype}, which is no unquantized weight.",
        "Those are BF16, F16 or F32; packed weights need a quantization_config in config.json.",
    )
