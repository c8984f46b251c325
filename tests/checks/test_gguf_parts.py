"""Models in several parts, and the table of their tensors by class."""

from __future__ import annotations

import pytest

from qtool.checks.inspect import inspect
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.formats.ggml import F32
from tests.checks.rewriting import codes, retype, rewrite_gguf

CODES = {"gguf-missing-part"}


def test_classes_count_types_sizes_and_bits(made):
    classes = {each.name: each for each in inspect(str(made("reranker-nvfp4-gguf"))).artefacts[0].classes}
    assert classes["attention"].types == {"NVFP4": 16}
    assert classes["attention"].bits_per_weight == pytest.approx(4.5, abs=0.01)
    assert classes["norms"].types == {"F32": 17}
    assert classes["norms"].bits_per_weight == 32
    assert classes["embedding"].weights == 1024 * 256
    assert "other" not in classes


def test_types_of_one_class_are_counted_apart(copy_of):
    folder = copy_of("text-reranker-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=retype("blk.0.ffn_up.weight", type=F32))
    classes = {each.name: each for each in inspect(str(folder)).artefacts[0].classes}
    assert classes["feed forward"].types == {"F16": 5, "F32": 1}


@pytest.fixture
def parts(made, tmp_path):
    """A model of several parts."""
    options = ConvertOptions(
        model=str(made("text-reranker")), output=tmp_path / "parts", outtypes=("f16",), split_max_bytes=100_000
    )
    convert_gguf(options)
    return sorted((tmp_path / "parts").glob("*.gguf"))


def test_a_split_model_is_one_model_whichever_part_is_named(parts):
    assert len(parts) > 2
    whole = inspect(str(parts[0].parent))
    assert codes(whole) == []
    assert [artefact.name for artefact in whole.artefacts] == [parts[0].name.replace(f"-00001-of-{len(parts):05}", "")]
    assert inspect(str(parts[1])).artefacts == whole.artefacts


@pytest.mark.parametrize("lost", [0, 1, -1])
def test_a_lost_part_is_named(lost, parts):
    parts[lost].unlink()
    (finding,) = inspect(str(parts[0].parent)).findings
    assert finding.code == "gguf-missing-part"
    assert parts[lost].name in finding.sentence
