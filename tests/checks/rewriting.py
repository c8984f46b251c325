"""Breaks weight files on purpose: GGUF by rewriting them with other fields or tensors, safetensors by their library."""

from __future__ import annotations

from dataclasses import dataclass, replace

from safetensors.torch import load_file, save_file

from qtool.storage.gguf import read_gguf
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out

TOKENIZER = "tokenizer.ggml."
"""How the fields of a GGUF file's tokenizer begin."""


@dataclass(frozen=True)
class Tensor:
    """A tensor with its bytes."""

    output: GgufOutputTensor
    data: bytes

    def changed(self, **changes):
        """The tensor with another type, shape or name; its bytes become zeros of the right number."""
        output = replace(self.output, **changes)
        elements = 1
        for size in output.shape:
            elements *= size
        nbytes = output.type.nbytes(elements)
        return Tensor(replace(output, nbytes=nbytes), bytes(nbytes))


def rewrite_gguf(path, fields=None, tensors=None):
    """Let `fields(dict)` and `tensors(dict)` change a file in place."""
    header, data = read_gguf(path), path.read_bytes()
    metadata = dict(header.metadata)
    stored = {
        name: Tensor(GgufOutputTensor(name, t.type, t.shape, t.nbytes), data[t.offset : t.offset + t.nbytes])
        for name, t in header.tensors.items()
    }
    if fields:
        fields(metadata)
    if tensors:
        tensors(stored)
    (layout,) = lay_out(path.name, metadata, [tensor.output for tensor in stored.values()])
    written = bytearray(layout.nbytes)
    written[: len(layout.header)] = layout.header
    for tensor in stored.values():
        start, nbytes = layout.ranges[tensor.output.gguf_name]
        written[start : start + nbytes] = tensor.data
    path.write_bytes(written)


def rewrite_safetensors(folder, change):
    """Let `change(dict)` alter the tensors of a checkpoint of one file."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop(key):
    return lambda values: values.pop(key)


def put(key, value):
    return lambda values: values.update({key: value})


def retype(name, **changes):
    return lambda tensors: tensors.update({name: tensors[name].changed(**changes)})


def codes(report):
    return [finding.code for finding in report.findings]
