"""The library of llama-cpp-python: what it reads of an importance matrix."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.errors import ModelError
from qtool.export import libllama
from tests.export.zeros import SOURCE, write_gguf, write_imatrix


class TestImportanceMatrices:
    def test_means_over_what_was_seen(self, tmp_path):
        path = write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (4, 2), "blk.1.attn_q.weight": (4, 0)})
        sums = np.random.default_rng(0).random((1, 4), np.float32)
        matrix = libllama.read_imatrix(path)
        np.testing.assert_array_equal(matrix.columns["blk.0.attn_q.weight"], sums[0] / np.float32(2))
        np.testing.assert_array_equal(matrix.columns["blk.1.attn_q.weight"], np.ones(4, np.float32))
        assert list(matrix.origin.items()) == [
            ("quantize.imatrix.file", str(path)),
            ("quantize.imatrix.dataset", "calibration.txt"),
            ("quantize.imatrix.entries_count", 2),
            ("quantize.imatrix.chunks_count", 3),
        ]

    def test_the_old_format_is_left_to_the_program(self, tmp_path):
        (tmp_path / "m.dat").write_bytes(bytes(64))
        with pytest.raises(ModelError) as error:
            libllama._read(tmp_path / "m.dat")
        assert "needs the program llama-quantize" in error.value.hint

    def test_a_model_is_none(self, tmp_path):
        with pytest.raises(ModelError, match="is not an importance matrix"):
            libllama.read_imatrix(write_gguf(tmp_path / "model.gguf", SOURCE))

    def test_sums_without_counts(self, tmp_path):
        path = write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (4, 2)}, counts=False)
        with pytest.raises(ModelError, match=r"has no .*\.in_sum2 or no .*\.counts"):
            libllama.read_imatrix(path)
