"""Projectors: broken ones, and those that do not fit their language model."""

from __future__ import annotations

import pytest
from gguf.constants import GGUFValueType

from qtool.checks.inspect import inspect
from qtool.storage.gguf import array, string, uint32
from tests.checks.rewriting import codes, drop, put, retype, rewrite_gguf

PROJECTOR_FIELDS = {
    "mmproj-type": put("clip.projector_type", string("ldp")),
    "mmproj-missing-field": drop("clip.vision.image_mean"),
    "mmproj-deepstack-flags": put("clip.vision.is_deepstack_layers", array(GGUFValueType.BOOL, [True, False, False])),
}
PROJECTOR_TENSORS = {
    "mmproj-missing-tensor": drop("v.blk.1.attn_qkv.weight"),
    "mmproj-taken-tensor": lambda t: t.update(gate=t["v.post_ln.weight"].changed(gguf_name="v.pre_ln.weight")),
    "mmproj-tensor-shape": retype("v.post_ln.weight", shape=(8,)),
}
"""By code: the change of the projector that does it."""
CODES = {*PROJECTOR_FIELDS, *PROJECTOR_TENSORS, "mmproj-missing", "mmproj-width", "mmproj-unreadable"}


@pytest.mark.parametrize(
    ("code", "fields", "tensors"),
    [(code, each, None) for code, each in PROJECTOR_FIELDS.items()]
    + [(code, None, each) for code, each in PROJECTOR_TENSORS.items()],
)
def test_a_wrong_projector_is_found(code, fields, tensors, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "mmproj.gguf", fields, tensors)
    assert code in codes(inspect(str(folder)))
    assert set(codes(inspect(str(folder)))) <= {code, "gguf-foreign"}


def test_a_projector_of_another_width_does_not_fit(copy_of):
    folder = copy_of("reranker-gguf")

    def narrow(tensors):
        for name in ("mm.2", "v.deepstack.0.fc2", "v.deepstack.1.fc2"):
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = weight.changed(shape=(128, weight.output.shape[1]))
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"].changed(shape=(128,))

    rewrite_gguf(folder / "mmproj.gguf", put("clip.vision.projection_dim", uint32(128)), narrow)
    report = inspect(str(folder))
    assert codes(report) == ["mmproj-width"]
    assert report.findings[0].sentence == "mmproj.gguf gives vectors of 128; the language model takes 256."


def test_a_language_file_alone_lacks_its_projector(copy_of):
    folder = copy_of("reranker-gguf")
    (folder / "mmproj.gguf").unlink()
    report = inspect(str(folder / "model.gguf"))
    assert codes(report) == ["mmproj-missing"]
    assert not report.broken


def test_a_projector_that_cannot_be_read_breaks_its_model_unless_another_fits(copy_of):
    folder = copy_of("reranker-gguf")
    good = (folder / "mmproj.gguf").rename(folder / "good")
    (folder / "mmproj.gguf").write_bytes(good.read_bytes()[:1000])
    report = inspect(str(folder / "model.gguf"))
    assert codes(report) == ["mmproj-unreadable"]
    assert "truncated" in report.findings[0].sentence
    good.rename(folder / "mmproj-good.gguf")
    report = inspect(str(folder / "model.gguf"))
    assert codes(report) == []
    assert report.artefacts[0].markers["projector"] == "mmproj-good.gguf"


def test_a_file_is_matched_with_the_projector_beside_it(made):
    report = inspect(str(made("reranker-gguf") / "model.gguf"))
    assert [artefact.name for artefact in report.artefacts] == ["model.gguf"]
    assert report.artefacts[0].markers["projector"] == "mmproj.gguf"


def test_a_projector_alone_is_judged_by_itself(made):
    report = inspect(str(made("reranker-gguf") / "mmproj.gguf"))
    assert [artefact.kind for artefact in report.artefacts] == ["gguf projector"]
    assert codes(report) == []


def test_missing_deepstack_is_found(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=drop("qwen3vl.n_deepstack_layers"))
    assert codes(inspect(str(folder))) == ["gguf-deepstack", "mmproj-deepstack"]
