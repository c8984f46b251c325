"""The global scales of NVFP4 files."""

from __future__ import annotations

import struct

import pytest

from qtool.checks.inspect import inspect
from tests.checks.rewriting import codes, drop, rewrite_gguf

SCALE = "blk.0.attn_q.scale"


def give(value):
    def change(tensors):
        tensors[SCALE] = tensors[SCALE].__class__(tensors[SCALE].output, struct.pack("<f", value))

    return change


def drop_scales(tensors):
    for name in [name for name in tensors if name.endswith(".scale")]:
        del tensors[name]


NVFP4 = {
    "nvfp4-missing-scale": drop(SCALE),
    "nvfp4-no-scales": drop_scales,
    "nvfp4-bad-scale": give(float("nan")),
    "nvfp4-unequal-source": give(0.5),
}
"""By code: the change of an NVFP4 file's tensors that does it."""
CODES = {*NVFP4, "nvfp4-scales-ignored"}


@pytest.mark.parametrize(("code", "change"), NVFP4.items())
def test_a_wrong_global_scale_is_found(code, change, copy_of):
    folder = copy_of("text-reranker-nvfp4-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=change)
    assert codes(inspect(str(folder))) == [code]


def test_the_scales_that_llama_cpp_ignores_are_warned_of(copy_of):
    folder = copy_of("reranker-nvfp4-gguf")
    report = inspect(str(folder))
    assert codes(report) == ["nvfp4-scales-ignored"]
    assert not report.broken
    rewrite_gguf(folder / "model.gguf", tensors=drop_scales)  # as where llama.cpp quantized it
    assert codes(inspect(str(folder))) == ["nvfp4-no-scales"]
