"""Importance matrices of both formats, and whether one fits a model."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from qtool.errors import ModelError, UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.imatrix import check_imatrix, read_old_imatrix
from qtool.storage.gguf import read_gguf
from tests.export.zeros import SOURCE, write_gguf, write_imatrix

SHAPES = {"blk.0.attn_q.weight": (64, 256), "blk.0.ffn_down.weight": (256, 512)}
FITTING = {name: (shape[-1], 7) for name, shape in SHAPES.items()}


def old_format(path, matrices):
    """What llama-imatrix wrote before GGUF: sums that are divided by the number of calls."""
    content = struct.pack("<i", len(matrices))
    for name, (width, calls) in matrices.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, width)
        content += np.full(width, calls * 0.5, "<f4").tobytes()
    path.write_bytes(content + struct.pack("<i", 3) + struct.pack("<i", 4) + b"text")
    return path


def written(kind, path, matrices):
    return write_imatrix(path, matrices) if kind == "gguf" else old_format(path, matrices)


kinds = pytest.mark.parametrize("kind", ["gguf", "dat"])


@kinds
def test_one_that_fits_is_read(kind, tmp_path):
    matrix = check_imatrix(written(kind, tmp_path / "m", {**FITTING, "output.weight": (256, 7)}), SHAPES)
    assert {name: len(values) for name, values in matrix.columns.items() if name in SHAPES} == {
        "blk.0.attn_q.weight": 256,
        "blk.0.ffn_down.weight": 512,
    }


def test_the_old_format_holds_means(tmp_path):
    matrix = read_old_imatrix(old_format(tmp_path / "m.dat", FITTING))
    assert set(matrix.columns["blk.0.attn_q.weight"].tolist()) == {0.5}


@kinds
@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"blk.0.attn_q.weight": (256, 7)}, r"no data for blk\.0\.ffn_down\.weight \(matrices without data: 1\)"),
        (
            {**FITTING, "blk.0.attn_q.weight": (128, 7)},
            r"has 128 columns for blk\.0\.attn_q\.weight; the model has 256",
        ),
        (
            {**FITTING, "blk.1.attn_q.weight": (256, 7)},
            r"has data for blk\.1\.attn_q\.weight, which the model does not",
        ),
    ],
)
def test_one_of_another_model_is_refused(kind, matrices, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        check_imatrix(written(kind, tmp_path / "m", matrices), SHAPES)


@pytest.mark.parametrize("content", [b"", bytes(64), b"\1\0\0\0\xff\xff\xff\x7f", b"GGUF", struct.pack("<3i", 1, 1, 0)])
def test_what_is_no_matrix_is_an_error(content, tmp_path):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ModelError):
        check_imatrix(tmp_path / "m", SHAPES)


def test_a_truncated_file_is_an_error(tmp_path):
    path = old_format(tmp_path / "m.dat", FITTING)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is not an importance matrix"):
        check_imatrix(path, SHAPES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"No such file: --imatrix .*none\.gguf"):
        check_imatrix(tmp_path / "none.gguf", SHAPES)


def test_a_model_is_no_matrix(tmp_path):
    with pytest.raises(ModelError, match="is not an importance matrix"):
        check_imatrix(write_gguf(tmp_path / "model.gguf", SOURCE), SHAPES)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_conversion_is_refused_before_anything_is_written(dry_run, tmp_path):
    matrix = write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (256, 7)})
    options = {"outtypes": ("q4_k_m",), "imatrix": matrix, "dry_run": dry_run}
    with pytest.raises(UsageError, match="matrices without data: 27") as error:
        convert_gguf(ConvertOptions(model="qtool-demo-reranker", output=tmp_path / "out", **options))
    assert "qtool calibrate MODEL" in error.value.hint
    assert not (tmp_path / "out").exists()
    assert read_gguf(matrix).tensors.keys() == {"blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"}
