"""Which element type each tensor gets in a file of a given type.

Rule: as llama.cpp's own converter decides, but for the rank head, which is never quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gguf.constants import LlamaFileType

from qtool.convert.names import PATCH_EMBEDDINGS, POSITION_EMBEDDING, RANK_HEAD
from qtool.formats.ggml import BF16, F16, F32, NVFP4, Q8_0, GgmlType


@dataclass(frozen=True)
class FileType:
    """A type of file: its number in `general.file_type`, what matrices become, and how its name is written."""

    label: str
    number: int
    matrices: GgmlType


FILE_TYPES: Final[Mapping[str, FileType]] = {
    "f32": FileType("F32", LlamaFileType.ALL_F32, F32),
    "f16": FileType("F16", LlamaFileType.MOSTLY_F16, F16),
    "bf16": FileType("BF16", LlamaFileType.MOSTLY_BF16, BF16),
    "q8_0": FileType("Q8_0", LlamaFileType.MOSTLY_Q8_0, Q8_0),
    "nvfp4": FileType("NVFP4", LlamaFileType.MOSTLY_NVFP4, NVFP4),
}
"""What qtool writes itself."""

LLAMA_QUANTIZE_TYPES: Final[Mapping[str, int]] = {
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
}
"""What llama.cpp quantizes, and its numbers for them."""


def element_type(gguf_name: str, shape: tuple[int, ...], matrices: GgmlType) -> GgmlType:
    """The type of one tensor in a file whose matrices are `matrices`."""
    if gguf_name in PATCH_EMBEDDINGS:  # a convolution, which ggml has for these two only
        return F16 if matrices is F16 else F32
    if len(shape) == 1 or gguf_name.endswith("_norm.weight") or gguf_name == POSITION_EMBEDDING:
        return F32
    if gguf_name == RANK_HEAD and matrices not in (F16, BF16):
        return F32  # two rows that every score hangs on; upstream packs them with the rest
    return matrices if shape[-1] % matrices.block == 0 else F16
