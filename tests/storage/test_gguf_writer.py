"""Files written by several threads, hashed tensor by tensor and slice by slice."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from qtool.formats.ggml import F32
from qtool.storage import gguf_layout as writer
from qtool.storage.gguf import string
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out


@pytest.mark.parametrize("piece", [7, 64, 100, 400])
def test_large_tensors_are_hashed_in_slices(piece, monkeypatch, tmp_path):
    monkeypatch.setattr(writer, "SLICE", 128)
    content = np.random.default_rng(0).integers(0, 256, 400, np.uint8)
    layouts = lay_out("f.gguf", {"general.architecture": string("x")}, [GgufOutputTensor("t", F32, (100,), 400)])
    with writer.open_gguf(layouts, tmp_path) as files:
        for start in reversed(range(0, 400, piece)):
            files.write("t", start, content[start : start + piece])
        hashes = dict(files.sha256())
    header = hashes.pop("header of f.gguf")
    assert header == hashlib.sha256(layouts[0].header).hexdigest()
    assert hashes == {
        f"t {number}/4": hashlib.sha256(content[start : start + 128]).hexdigest()
        for number, start in enumerate(range(0, 400, 128), start=1)
    }
