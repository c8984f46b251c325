"""The element types of ggml: how many values a block holds and in how many bytes.

Rule: numbers and sizes are the gguf package's own; what qtool writes itself is in `ggml_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True)
class GgmlType:
    """One element type: `block` values in `block_bytes` bytes."""

    number: int
    name: str
    block: int
    block_bytes: int

    def nbytes(self, elements: int) -> int:
        """Bytes of `elements` values."""
        return elements // self.block * self.block_bytes


GGML_TYPES: Final[Mapping[int, GgmlType]] = {
    int(number): GgmlType(int(number), number.name, *sizes) for number, sizes in GGML_QUANT_SIZES.items()
}
"""Every known type by its number."""

F32: Final = GGML_TYPES[GGMLQuantizationType.F32]
F16: Final = GGML_TYPES[GGMLQuantizationType.F16]
BF16: Final = GGML_TYPES[GGMLQuantizationType.BF16]
Q8_0: Final = GGML_TYPES[GGMLQuantizationType.Q8_0]
NVFP4: Final = GGML_TYPES[GGMLQuantizationType.NVFP4]
