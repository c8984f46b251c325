"""Small GGUF files of zeros, and importance matrices."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

SOURCE = {
    "cls.output.weight": ((2, 256), Type.F16),
    "token_embd.weight": ((64, 256), Type.F16),
    "output_norm.weight": ((256,), Type.F32),
    "blk.0.attn_q.weight": ((256, 256), Type.F16),
}


def write_gguf(path, tensors, *, file_type=1, labels=("yes", "no"), pooling=4):
    """A file whose tensors are zeros."""
    writer = GGUFWriter(path, "qwen3")
    writer.add_file_type(file_type)
    writer.add_uint32("qwen3.pooling_type", pooling)
    if labels:
        writer.add_array("qwen3.classifier.output_labels", list(labels))
    writer.add_string("tokenizer.chat_template.rerank", "{query} {document}")
    for name, (shape, kind) in tensors.items():
        writer.add_tensor(name, np.zeros(quant_shape_to_byte_shape(shape, kind), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_imatrix(path, matrices, *, counts=True, chunks=3):
    """An importance matrix; `matrices` says for each name the width and how often it was seen."""
    writer = GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(0)
    for name, (width, count) in matrices.items():
        writer.add_tensor(f"{name}.in_sum2", random.random((1, width), np.float32))
        if counts:
            writer.add_tensor(f"{name}.counts", np.full((1, 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
