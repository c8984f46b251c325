"""One small real GGUF file, made by qtool."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGUFValueType

from qtool.formats.ggml import F16, F32, Q8_0
from qtool.storage.gguf import array, boolean, float32, int32, string, uint32
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out
from qtool.storage.output_files import open_files

METADATA = {
    "general.architecture": string("qwen3"),
    "general.alignment": uint32(32),
    "qwen3.block_count": uint32(2),
    "qwen3.rope.freq_base": float32(1e6),
    "an.int": int32(-5),
    "a.flag": boolean(True),
    "tokenizer.ggml.tokens": array(GGUFValueType.STRING, ["yes", "no", "Ġü", ""]),
    "tokenizer.ggml.token_type": array(GGUFValueType.INT32, [1, 1, 3, 5]),
}
TENSORS = [
    GgufOutputTensor("a.weight", F16, (3, 32), 192),
    GgufOutputTensor("odd", F32, (5,), 20),
    GgufOutputTensor("b.weight", Q8_0, (2, 64), 136),
]


def write(folder, tensors=TENSORS, metadata=METADATA, max_bytes=None):
    """Write a file, or its parts, of counting bytes; their paths."""
    layouts = lay_out("model.gguf", metadata, tensors, max_bytes)
    with open_files(layouts, folder) as files:
        for tensor in tensors:
            files.write(tensor.gguf_name, 0, np.arange(tensor.nbytes, dtype=np.uint8))
    return [folder / layout.file_name for layout in layouts]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The path of a healthy file."""
    return write(tmp_path_factory.mktemp("gguf"))[0]
