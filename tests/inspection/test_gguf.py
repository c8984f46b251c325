"""Each way to break a GGUF file gives its one code; a healthy file gives none."""

from __future__ import annotations

import struct

import pytest

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER
from qtool.arch.spec import Task
from qtool.convert.names import RANK_HEAD
from qtool.convert.options import ConvertOptions
from qtool.convert.repair import RepairOptions, repair_gguf
from qtool.convert.run import convert_gguf
from qtool.convert.templates import RERANK_KEY
from qtool.errors import ModelError
from qtool.formats.ggml import F32, GGML_TYPES, Q8_0
from qtool.gguf_file.values import Kind, Value, array, boolean, float32, string, uint32
from qtool.inspection.catalogue import CODES as CATALOGUE
from qtool.inspection.finding import Severity
from qtool.inspection.run import inspect
from tests.inspection.surgery import rewrite_gguf

TOKENIZER = "tokenizer.ggml."
Q4_0 = next(each for each in GGML_TYPES.values() if each.name == "Q4_0")
LABELS = "qwen3vl.classifier.output_labels"


def drop(key):
    return lambda values: values.pop(key)


def put(key, value):
    return lambda values: values.update({key: value})


def retype(name, **changes):
    return lambda tensors: tensors.update({name: tensors[name].changed(**changes)})


def baked(prompt, instruction=None):
    return string(prompt.template.replace("{instruction}", instruction or prompt.default_instruction))


def forget(word):
    def change(values):
        tokens = [f"[{word}]" if token == word else token for token in values[f"{TOKENIZER}tokens"].data]
        values[f"{TOKENIZER}tokens"] = array(Kind.STRING, tokens)

    return change


def make_normal(token):
    def change(values):
        kinds = list(values[f"{TOKENIZER}token_type"].data)
        kinds[values[f"{TOKENIZER}tokens"].data.index(token)] = 1
        values[f"{TOKENIZER}token_type"] = array(Kind.INT32, kinds)

    return change


def published_size(values):
    """The fields of the 2B model, whose rotary base is not the demo's."""
    values.update({"qwen3vl.embedding_length": uint32(2048), "qwen3vl.block_count": uint32(28)})


FIELDS = {
    "gguf-no-architecture": ("reranker", drop("general.architecture")),
    "gguf-foreign": ("reranker", put("general.architecture", string("llama"))),
    "gguf-part-count": ("reranker", put("split.tensors.count", uint32(3))),
    "gguf-missing-field": ("reranker", drop("qwen3vl.feed_forward_length")),
    "gguf-no-pooling": ("reranker", drop("qwen3vl.pooling_type")),
    "gguf-wrong-pooling": ("reranker", put("qwen3vl.pooling_type", uint32(1))),
    "gguf-labels": ("reranker", put(LABELS, array(Kind.STRING, ["no", "yes"]))),
    "gguf-no-rerank-template": ("reranker", drop(RERANK_KEY)),
    "gguf-wrong-rerank-template": ("reranker", put(RERANK_KEY, baked(TEXT_RERANKER))),
    "gguf-incomplete-rerank-template": ("reranker", put(RERANK_KEY, string("{query}"))),
    "gguf-unknown-rerank-template": ("reranker", put(RERANK_KEY, string("{query} {document}"))),
    "gguf-own-instruction": ("reranker", put(RERANK_KEY, baked(VL_RERANKER, "Find birds."))),
    "gguf-tokenizer": ("reranker", drop(f"{TOKENIZER}merges")),
    "gguf-pre-tokenizer": ("reranker", put(f"{TOKENIZER}pre", string("default"))),
    "gguf-no-yes-no-token": ("reranker", forget("yes")),
    "gguf-prompt-token": ("reranker", make_normal("<|im_start|>")),
    "gguf-start-token": ("reranker", put(f"{TOKENIZER}add_bos_token", boolean(True))),
    "gguf-end-token": ("text-embedder", put(f"{TOKENIZER}add_eos_token", boolean(False))),
    "gguf-rope": ("reranker", drop("qwen3vl.rope.freq_base")),
    "gguf-rope-scaling": ("reranker", put("qwen3vl.rope.scaling.type", string("yarn"))),
    "mmproj-deepstack": ("reranker", put("qwen3vl.n_deepstack_layers", uint32(1))),
}
"""By code: the file to break and the change of its fields that does it."""

TENSORS = {
    "gguf-missing-tensor": drop("blk.1.attn_q.weight"),
    "gguf-tensor-shape": retype("blk.1.attn_norm.weight", shape=(8,)),
    "gguf-unknown-tensor": lambda t: t.update(extra=t["output_norm.weight"].changed(gguf_name="extra.weight")),
    "gguf-no-rank-head": drop(RANK_HEAD),
    "gguf-head-shape": retype(RANK_HEAD, shape=(1, 256)),
    "gguf-head-quantized": retype(RANK_HEAD, type=Q4_0),
    "gguf-head-8-bit": retype(RANK_HEAD, type=Q8_0),
}
"""By code: the change of the reranker's tensors that does it."""

PROJECTOR_FIELDS = {
    "mmproj-type": put("clip.projector_type", string("ldp")),
    "mmproj-missing-field": drop("clip.vision.image_mean"),
    "mmproj-deepstack-flags": put("clip.vision.is_deepstack_layers", array(Kind.BOOL, [True, False, False])),
}
PROJECTOR_TENSORS = {
    "mmproj-missing-tensor": drop("v.blk.1.attn_qkv.weight"),
    "mmproj-tensor-shape": retype("v.post_ln.weight", shape=(8,)),
}
"""By code: the change of the projector that does it."""

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

CODES = {*FIELDS, *TENSORS, *PROJECTOR_FIELDS, *PROJECTOR_TENSORS, *NVFP4} | {
    "gguf-task-undeclared", "gguf-missing-part", "gguf-deepstack", "mmproj-missing", "mmproj-width",
}  # fmt: skip
"""Every code that this file tests."""


def codes(report):
    return [finding.code for finding in report.findings]


@pytest.mark.parametrize("name", ["reranker", "embedder", "text-reranker", "text-embedder", "reranker-nvfp4"])
def test_a_healthy_file_has_nothing_to_complain_about(name, made):
    report = inspect(str(made(f"{name}-gguf")))
    assert codes(report) == []
    language = report.artefacts[0]
    assert language.task == ("rerank" if "reranker" in name else "embed")
    assert {artefact.kind for artefact in report.artefacts} == (
        {"gguf"} if "text" in name else {"gguf", "gguf projector"}
    )
    assert language.architecture == ("qwen3" if "text" in name else "qwen3vl")


@pytest.mark.parametrize(("code", "name", "change"), [(code, *each) for code, each in FIELDS.items()])
def test_a_wrong_field_is_found(code, name, change, copy_of):
    folder = copy_of(f"{name}-gguf")
    rewrite_gguf(folder / "model.gguf", fields=change)
    assert codes(inspect(str(folder))) == [code]


@pytest.mark.parametrize(("code", "change"), TENSORS.items())
def test_a_wrong_tensor_is_found(code, change, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=change)
    assert codes(inspect(str(folder))) == [code]


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


@pytest.mark.parametrize(("code", "change"), NVFP4.items())
def test_a_wrong_global_scale_is_found(code, change, copy_of):
    folder = copy_of("reranker-nvfp4-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=change)
    assert codes(inspect(str(folder))) == [code]


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
    assert report.findings[0].sentence == "mmproj.gguf gives vectors of 128, the language model takes 256."


def test_a_language_file_alone_lacks_its_projector(copy_of):
    folder = copy_of("reranker-gguf")
    (folder / "mmproj.gguf").unlink()
    report = inspect(str(folder / "model.gguf"))
    assert codes(report) == ["mmproj-missing"]
    assert not report.broken


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


def test_a_plain_conversion_is_suspected_and_with_the_task_condemned(copy_of):
    folder = copy_of("text-reranker-gguf")

    def forget_the_task(values):
        for key in ("qwen3.pooling_type", "qwen3.classifier.output_labels", RERANK_KEY):
            del values[key]

    rewrite_gguf(folder / "model.gguf", forget_the_task, drop(RANK_HEAD))
    unsure = inspect(str(folder))
    assert codes(unsure) == ["gguf-task-undeclared"]
    assert not unsure.broken
    as_reranker = inspect(str(folder), Task.RERANK)
    assert codes(as_reranker) == ["gguf-no-pooling", "gguf-no-rank-head", "gguf-labels", "gguf-no-rerank-template"]
    assert as_reranker.broken
    assert as_reranker.findings[0].remedy == (f"qtool repair-gguf {folder / 'model.gguf'} -o FIXED.gguf --task rerank")
    assert codes(inspect(str(folder), Task.EMBED)) == ["gguf-no-pooling", "gguf-end-token"]


def test_published_sizes_are_held_to_what_was_published(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=published_size)
    report = inspect(str(folder))
    assert report.artefacts[0].family == "Qwen3-VL 2B"
    sentences = [finding.sentence for finding in report.findings if finding.code in ("gguf-rope", "gguf-deepstack")]
    assert "its base is 10,000, and Qwen3-VL 2B has 5,000,000" in sentences[0]
    assert "[12, 10, 10], and Qwen3-VL 2B has [24, 20, 20]" in sentences[1]
    assert "2 deepstack layers are declared, and Qwen3-VL has 3" in sentences[2]


def test_sections_must_fill_half_a_head(copy_of):
    folder = copy_of("reranker-gguf")
    sections = array(Kind.INT32, [12, 10, 8, 0])
    rewrite_gguf(folder / "model.gguf", fields=put("qwen3vl.rope.dimension_sections", sections))
    (finding,) = inspect(str(folder)).findings
    assert finding.code == "gguf-rope"
    assert "do not add up to 32" in finding.sentence


@pytest.mark.parametrize(("token", "problem"), [("<|im_end|>", "instead of"), (None, "no token")])
def test_the_token_that_a_text_embedder_pools_is_looked_at(token, problem, copy_of):
    folder = copy_of("text-embedder-gguf")

    def change(values):
        tokens = values[f"{TOKENIZER}tokens"].data
        values[f"{TOKENIZER}eos_token_id"] = uint32(tokens.index(token) if token else len(tokens))

    rewrite_gguf(folder / "model.gguf", fields=change)
    (finding,) = inspect(str(folder)).findings
    assert finding.code == "gguf-end-token"
    assert problem in finding.sentence


def test_the_vision_embedder_must_not_get_an_end_token(copy_of):
    folder = copy_of("embedder-gguf")
    rewrite_gguf(folder / "model.gguf", fields=put(f"{TOKENIZER}add_eos_token", boolean(True)))
    assert codes(inspect(str(folder))) == ["gguf-end-token"]


def test_a_field_of_the_wrong_type_counts_as_missing(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=put("qwen3vl.pooling_type", string("rank")))
    assert codes(inspect(str(folder))) == ["gguf-no-pooling"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen3vl.block_count", uint32((1 << 32) - 1)),
        ("qwen3vl.embedding_length", Value(Kind.INT32, -1)),
        ("qwen3vl.attention.head_count_kv", Value(Kind.INT32, -5)),
        ("qwen3vl.rope.freq_base", string("high")),
        ("qwen3vl.rope.freq_base", float32(float("nan"))),
        ("qwen3vl.rope.dimension_sections", array(Kind.STRING, ["a"])),
        (f"{TOKENIZER}tokens", uint32(7)),
        (f"{TOKENIZER}token_type", array(Kind.INT32, [])),
        (f"{TOKENIZER}eos_token_id", Value(Kind.INT32, -1)),
        ("general.file_type", string("x")),
        ("general.architecture", uint32(1)),
    ],
)
def test_nonsense_in_a_field_is_survived(key, value, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=put(key, value))
    inspect(str(folder)).to_json()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip.vision.block_count", uint32((1 << 32) - 1)),
        ("clip.vision.patch_size", Value(Kind.INT32, -1)),
        ("clip.vision.spatial_merge_size", Value(Kind.INT32, -1)),
        ("clip.vision.image_size", uint32(1)),
        ("clip.projector_type", uint32(1)),
    ],
)
def test_nonsense_in_a_projector_is_survived(key, value, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "mmproj.gguf", fields=put(key, value))
    inspect(str(folder)).to_json()


def test_a_fused_attention_is_the_same_model(copy_of):
    folder = copy_of("text-reranker-gguf")

    def fuse(tensors):
        parts = [tensors.pop(f"blk.0.attn_{letter}.weight") for letter in "qkv"]
        rows = sum(part.output.shape[0] for part in parts)
        fused = parts[0].changed(gguf_name="blk.0.attn_qkv.weight", shape=(rows, parts[0].output.shape[1]))
        tensors["blk.0.attn_qkv.weight"] = fused

    rewrite_gguf(folder / "model.gguf", tensors=fuse)
    assert codes(inspect(str(folder))) == []


def test_adapters_and_other_kinds_of_files_are_named_and_left_alone(copy_of):
    folder = copy_of("text-reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=put("general.type", string("adapter")))
    report = inspect(str(folder / "model.gguf"))
    assert codes(report) == ["gguf-foreign"]
    assert report.findings[0].severity is Severity.NOTE
    assert "a GGUF adapter of the architecture qwen3" in report.findings[0].sentence


def test_a_corrupt_header_is_an_error(copy_of):
    path = copy_of("text-reranker-gguf") / "model.gguf"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.gguf"):
        inspect(str(path))


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
    options = ConvertOptions(str(made("text-reranker")), tmp_path / "parts", ("f16",), split_max_bytes=100_000)
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


REPAIRED = [code for code in (*FIELDS, *TENSORS) if "repair-gguf" in CATALOGUE[code].remedy]


@pytest.mark.parametrize("code", REPAIRED)
def test_the_repair_that_is_named_mends_it(code, copy_of, made):
    folder = copy_of("reranker-gguf")
    broken, fixed = folder / "model.gguf", folder / "fixed.gguf"
    rewrite_gguf(broken, FIELDS[code][1] if code in FIELDS else None, TENSORS.get(code))
    base = str(made("reranker")) if "--base" in CATALOGUE[code].remedy else None
    repair_gguf(RepairOptions(broken, fixed, base, Task.RERANK))
    assert codes(inspect(str(fixed))) == []
