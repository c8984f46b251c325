"""GGUF files as other writers make them, legal and unusual, alarm no stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import dequantize, quantize

from qtool.checks.stage import Outcome
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.formats.ggml import F32, GGML_TYPES
from qtool.storage.gguf import Value, array, boolean, float32, string, uint32
from qtool.storage.gguf_layout import GgufOutputTensor
from qtool.storage.gguf_model import TOKEN_EMBEDDING
from tests.checks import surgery
from tests.checks.good import append_end, make, write_reference
from tests.checks.rewriting import Tensor
from tests.checks.stages import check_structure, compare_weights, rederive

FORMS = (("vl", "rerank"), ("vl", "embed"), ("text", "rerank"), ("tied-text", "embed"))


def fields(change):
    return lambda folder: [surgery.gguf(folder, fields=change, name=path.name) for path in folder.glob("*.gguf")]


def tensors(change):
    return lambda folder: surgery.gguf(folder, tensors=change)


def values_of(tensor):
    kind = GGMLQuantizationType[tensor.output.type.name]
    return dequantize(np.frombuffer(tensor.data, np.uint8), kind).astype(np.float32).reshape(tensor.output.shape)


def widen(*names):
    """Store some matrices as F32."""

    def change(stored):
        for name in names or [n for n, t in stored.items() if t.output.type is not F32]:
            values = values_of(stored[name])
            stored[name] = replace(stored[name].changed(type=F32), data=values.tobytes())

    return change


def reorder(stored):
    """Let the tensors lie in another order."""
    names = list(stored)
    np.random.default_rng(1).shuffle(names)
    for name in names:
        stored[name] = stored.pop(name)


def store_the_tied_head(stored):
    """The embedding once more, as the head."""
    old = stored[TOKEN_EMBEDDING]
    stored["output.weight"] = replace(old, output=replace(old.output, gguf_name="output.weight"))


def fuse(stored):
    """q, k and v of every layer as one matrix."""
    for layer in range(3):
        parts = [stored.pop(f"blk.{layer}.attn_{letter}.weight") for letter in "qkv"]
        rows, name = sum(part.output.shape[0] for part in parts), f"blk.{layer}.attn_qkv.weight"
        made = parts[0].changed(gguf_name=name, shape=(rows, parts[0].output.shape[1]))
        stored[name] = replace(made, data=b"".join(part.data for part in parts))


def scale_by_one(stored):
    """A scale beside a weight that needs none, as some writers leave it."""
    data = np.ones(1, np.float32).tobytes()
    for name in ("blk.0.attn_q.scale", "blk.1.ffn_down.scale"):
        stored[name] = Tensor(GgufOutputTensor(name, F32, (1,), len(data)), data)


def describe(metadata):
    """What people add."""
    metadata["general.author"] = string("somebody")
    metadata["general.license"] = string("apache-2.0")
    metadata["general.tags"] = array(GGUFValueType.STRING, ["reranker"])
    metadata["quantize.imatrix.entries_count"] = Value(GGUFValueType.INT32, 7)
    metadata["my.own.field"] = float32(1)


def spell_out(metadata):
    """What llama.cpp would take anyway."""
    architecture = metadata["general.architecture"].data
    if architecture == "clip":
        return
    head_dim = metadata[f"{architecture}.attention.key_length"]
    layers = metadata[f"{architecture}.block_count"].data
    metadata[f"{architecture}.attention.causal"] = boolean(True)
    metadata[f"{architecture}.rope.dimension_count"] = head_dim
    metadata[f"{architecture}.rope.scaling.type"] = string("none")
    metadata[f"{architecture}.expert_count"] = uint32(0)
    for name in ("head_count", "head_count_kv"):
        value = metadata[f"{architecture}.attention.{name}"]
        metadata[f"{architecture}.attention.{name}"] = array(value.kind, layers * [value.data])
    metadata["tokenizer.ggml.add_bos_token"] = boolean(False)
    metadata["tokenizer.ggml.add_space_prefix"] = boolean(False)


VARIANTS = {
    "alignment-8": fields(lambda metadata: metadata.update({"general.alignment": uint32(8)})),
    "alignment-64": fields(lambda metadata: metadata.update({"general.alignment": uint32(64)})),
    "alignment-4096": fields(lambda metadata: metadata.update({"general.alignment": uint32(4096)})),
    "more-metadata": fields(describe),
    "defaults-spelled-out": fields(spell_out),
    "fields-in-reverse": fields(lambda m: [m.update({key: m.pop(key)}) for key in list(m)[::-1]]),
    "tensors-in-another-order": tensors(reorder),
    "wide-embedding": tensors(widen(TOKEN_EMBEDDING)),
    "one-wide-matrix": tensors(widen("blk.1.ffn_up.weight")),
    "tied-head-stored": tensors(store_the_tied_head),
    "fused-attention": tensors(fuse),
    "scaled-by-one": tensors(scale_by_one),
    "of-another-general-type": fields(
        lambda metadata: (
            metadata["general.architecture"].data == "clip" or metadata.update({"general.type": string("reranker")})
        )
    ),
}


def broken_or_warned(stage):
    return stage.outcome, [each.code for each in stage.findings if each.severity.value != "note"]


GOOD = (Outcome.PASS, [])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(2))
def test_another_writer_alarms_nobody(variant, seed, tmp_path):
    place = list(VARIANTS).index(variant) + seed
    form, task = FORMS[place % len(FORMS)]
    reference = write_reference(tmp_path / "reference", form, task=task, seed=seed)
    if form == "tied-text":
        append_end(reference)
    if variant == "tied-head-stored" and form == "text":
        pytest.skip("its head is not tied")
    artefact = make(reference, tmp_path / "artefact", ("gguf-f16", "gguf-bf16")[seed])
    VARIANTS[variant](artefact)
    assert broken_or_warned(check_structure(artefact, reference)) == GOOD
    assert broken_or_warned(compare_weights(artefact, reference)[0]) == GOOD
    if variant not in ("fused-attention", "scaled-by-one"):
        again = rederive(artefact, reference, tmp_path)[0]
        assert broken_or_warned(again) == GOOD
        assert ("tensors-stored-wider" in {each.code for each in again.findings}) == ("wide" in variant)


@pytest.mark.parametrize("kind", ["gguf-f16", "gguf-q8_0"])
def test_a_split_model_alarms_nobody(kind, builder, tmp_path):
    reference = builder.reference("reranker")
    options = ConvertOptions(
        model=str(reference), output=tmp_path / "parts", outtypes=(kind.removeprefix("gguf-"),), split_max_bytes=200_000
    )
    convert_gguf(options)
    artefact = next(path for path in sorted((tmp_path / "parts").glob("*.gguf")) if "00001-of" in path.name)
    assert broken_or_warned(check_structure(artefact, reference)) == GOOD
    assert broken_or_warned(compare_weights(artefact, reference)[0]) == GOOD


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_a_mixture_of_types_alarms_nobody(kind, seed, builder, tmp_path):
    """As llama-quantize mixes: the declared type for most, a better one for some, norms and head as they are."""
    artefact = shutil.copytree(builder.good("reranker/gguf-f16"), tmp_path / "artefact")

    def mix(stored):
        random = np.random.default_rng(seed)
        for name in [name for name in stored if name.startswith("blk.") and "norm" not in name]:
            number = GGMLQuantizationType["Q8_0" if random.random() < 0.3 and "attn_q" not in name else kind]
            made = stored[name].changed(type=GGML_TYPES[number])
            stored[name] = replace(made, data=quantize(values_of(stored[name]), number).tobytes())

    declared = uint32(LlamaFileType[f"MOSTLY_{kind}"])
    surgery.gguf(artefact, tensors=mix, fields=lambda metadata: metadata.update({"general.file_type": declared}))
    reference = builder.reference("reranker")
    assert broken_or_warned(check_structure(artefact, reference)) == GOOD
    assert broken_or_warned(compare_weights(artefact, reference)[0]) == GOOD


@pytest.mark.parametrize("layout", ["scales-as-lists", "head-left-out"])
def test_another_exporter_of_nvfp4_alarms_nobody(layout, builder, tmp_path):
    artefact = shutil.copytree(builder.good("reranker/nvfp4"), tmp_path / "artefact")
    reference = builder.reference("reranker")

    def as_lists(stored):
        for name, raw in stored.items():
            if name.endswith("weight_scale_2"):
                stored[name] = raw.holding(raw.data.reshape(1))

    if layout == "scales-as-lists":
        surgery.weights(artefact, as_lists)
    else:
        surgery.weights(artefact, lambda stored: stored.pop("lm_head.weight", None))
    assert broken_or_warned(check_structure(artefact, reference)) == GOOD
    assert broken_or_warned(compare_weights(artefact, reference)[0]) == GOOD
    assert broken_or_warned(rederive(artefact, reference, tmp_path)[0]) == GOOD
    manifest = json.loads((artefact / "qtool.json").read_text())
    assert manifest["recipe"]["name"]
