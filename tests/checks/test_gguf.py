"""Each way to break a GGUF file gives its one code; a healthy file gives none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER
from qtool.arch.spec import Task
from qtool.checks.findings import INSPECTION_CODES as CATALOGUE
from qtool.checks.inspect import inspect
from qtool.export.repair import RepairOptions, repair_gguf
from qtool.formats.ggml import GGML_TYPES, Q8_0
from qtool.storage.gguf import array, boolean, float32, string, uint32
from qtool.storage.gguf_model import RANK_HEAD, RERANK_KEY
from tests.checks.rewriting import TOKENIZER, codes, drop, put, retype, rewrite_gguf

Q4_0 = next(each for each in GGML_TYPES.values() if each.name == "Q4_0")
LABELS = "qwen3vl.classifier.output_labels"


def baked(prompt, instruction=None):
    return string(prompt.template.replace("{instruction}", instruction or prompt.default_instruction))


def exchanged(prompt):
    """The prompt with document and query in each other's place."""
    text = baked(prompt).data.replace("{query}", "{}").replace("{document}", "{query}")
    return string(text.replace("{}", "{document}"))


def forget(word):
    def change(values):
        tokens = [f"[{word}]" if token == word else token for token in values[f"{TOKENIZER}tokens"].data]
        values[f"{TOKENIZER}tokens"] = array(GGUFValueType.STRING, tokens)

    return change


def make_normal(token):
    def change(values):
        kinds = list(values[f"{TOKENIZER}token_type"].data)
        kinds[values[f"{TOKENIZER}tokens"].data.index(token)] = 1
        values[f"{TOKENIZER}token_type"] = array(GGUFValueType.INT32, kinds)

    return change


def exchange_rows(tensors):
    """Let no stand before yes in the rank head."""
    head = tensors[RANK_HEAD]
    half = len(head.data) // 2
    tensors[RANK_HEAD] = replace(head, data=head.data[half:] + head.data[:half])


def train_head(tensors):
    """A head that is nobody's row in the vocabulary."""
    head = tensors[RANK_HEAD]
    rows = np.random.default_rng(7).normal(size=head.output.shape).astype(np.float16)
    tensors[RANK_HEAD] = replace(head, data=rows.tobytes())


def store_head_as(kind):
    """The same rows, packed."""

    def change(tensors):
        head = tensors[RANK_HEAD]
        rows = np.frombuffer(head.data, np.float16).reshape(head.output.shape).astype(np.float32)
        packed = quantize(rows, GGMLQuantizationType(kind.number)).tobytes()
        tensors[RANK_HEAD] = replace(head.changed(type=kind), data=packed)

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
    "gguf-labels": ("reranker", put(LABELS, array(GGUFValueType.STRING, ["no", "yes"]))),
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
    "gguf-rope-scaling": ("reranker", put("qwen3vl.rope.scaling.factor", float32(4))),
    "gguf-not-causal": ("reranker", put("qwen3vl.attention.causal", boolean(False))),
    "gguf-aborts": ("reranker", put("qwen3vl.rope.dimension_count", uint32(8))),
    "gguf-refused": ("reranker", put("qwen3vl.attention.causal", uint32(1))),
    "gguf-file-type": ("reranker", put("general.file_type", uint32(LlamaFileType.MOSTLY_Q8_0))),
    "gguf-ranker-markers": ("text-embedder", put(RERANK_KEY, string("{query}{document}"))),
    "gguf-template-names": ("reranker", put("tokenizer.chat_templates", array(GGUFValueType.STRING, ["tools"]))),
    "gguf-doubled-placeholder": ("reranker", put(RERANK_KEY, string("{query}{query}{document}"))),
    "gguf-exchanged-placeholders": ("reranker", put(RERANK_KEY, exchanged(VL_RERANKER))),
    "gguf-padded-rerank-template": ("reranker", put(RERANK_KEY, string("\n" + baked(VL_RERANKER).data))),
    "gguf-respaced-rerank-template": ("reranker", put(RERANK_KEY, string(baked(VL_RERANKER).data.replace("\n", " ")))),
    "mmproj-deepstack": ("reranker", put("qwen3vl.n_deepstack_layers", uint32(1))),
}
"""By code: the file to break and the change of its fields that does it."""

TENSORS = {
    "gguf-missing-tensor": drop("blk.1.attn_q.weight"),
    "gguf-tensor-shape": retype("blk.1.attn_norm.weight", shape=(8,)),
    "gguf-unknown-tensor": lambda t: t.update(extra=t["output_norm.weight"].changed(gguf_name="extra.weight")),
    "gguf-stray-scale": lambda t: t.update(
        scale=t["output_norm.weight"].changed(gguf_name="blk.0.attn_q.scale", shape=(1,))
    ),
    "gguf-no-rank-head": drop(RANK_HEAD),
    "gguf-head-shape": retype(RANK_HEAD, shape=(1, 256)),
    "gguf-head-quantized": store_head_as(Q4_0),
    "gguf-head-8-bit": store_head_as(Q8_0),
    "gguf-head-exchanged": exchange_rows,
}
"""By code: the change of the reranker's tensors that does it."""

CODES = {*FIELDS, *TENSORS, "gguf-task-undeclared", "gguf-deepstack"}
"""Every code that this file tests."""


@pytest.mark.parametrize("name", ["reranker", "embedder", "text-reranker", "text-embedder", "text-reranker-nvfp4"])
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
    asked = Task.EMBED if name == "text-embedder" else None
    assert codes(inspect(str(folder), asked)) == [code]


@pytest.mark.parametrize(("code", "change"), TENSORS.items())
def test_a_wrong_tensor_is_found(code, change, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=change)
    assert codes(inspect(str(folder))) == [code]


def test_a_plain_conversion_is_suspected_and_with_the_task_condemned(copy_of):
    folder = copy_of("text-reranker-gguf")

    def forget_the_task(values):
        for key in ("qwen3.pooling_type", "qwen3.classifier.output_labels", RERANK_KEY):
            del values[key]

    rewrite_gguf(folder / "model.gguf", forget_the_task, drop(RANK_HEAD))
    unsure = inspect(str(folder))
    assert codes(unsure) == ["gguf-task-undeclared"]
    assert not unsure.broken
    assert unsure.undecided
    assert unsure.findings[0].remedy == f"qtool inspect {folder / 'model.gguf'} --task rerank"
    as_reranker = inspect(str(folder), Task.RERANK)
    assert codes(as_reranker) == ["gguf-no-pooling", "gguf-no-rank-head", "gguf-labels", "gguf-no-rerank-template"]
    assert as_reranker.broken
    assert as_reranker.findings[0].remedy == (f"qtool repair-gguf {folder / 'model.gguf'} -o FIXED.gguf --task rerank")
    assert codes(inspect(str(folder), Task.EMBED)) == ["gguf-no-pooling", "gguf-end-token"]


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"general.name": "My Reranker 2B"}, "; general.name My Reranker 2B suggests a reranker."),
        (
            {"general.name": "x", "general.basename": "Some-Embedding"},
            "; general.basename Some-Embedding suggests an embedder.",
        ),
        ({"general.name": "x"}, "chat model does not either."),
    ],
)
def test_a_name_that_speaks_of_a_task_is_told_and_decides_nothing(fields, hint, copy_of):
    folder = copy_of("text-embedder-gguf")

    def rename(values):
        del values["qwen3.pooling_type"]
        values.update({key: string(name) for key, name in fields.items()})

    rewrite_gguf(folder / "model.gguf", fields=rename)
    (finding,) = inspect(str(folder)).findings
    assert finding.code == "gguf-task-undeclared"
    assert hint in finding.sentence
    assert finding.remedy.endswith("--task embed" if "basename" in hint else "--task rerank")


def test_published_sizes_are_held_to_what_was_published(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", fields=published_size)
    report = inspect(str(folder))
    assert report.artefacts[0].family == "Qwen3-VL 2B"
    sentences = [finding.sentence for finding in report.findings if finding.code in ("gguf-rope", "gguf-deepstack")]
    assert "the base is 10,000; Qwen3-VL 2B has 5,000,000" in sentences[0]
    assert "[11, 11, 10]; Qwen3-VL 2B has [24, 20, 20]" in sentences[1]
    assert "2 deepstack layers are declared; Qwen3-VL 2B has 3" in sentences[2]


def test_sections_must_fill_half_a_head(copy_of):
    folder = copy_of("reranker-gguf")
    sections = array(GGUFValueType.INT32, [12, 10, 8, 0])
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


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
def test_a_packed_head_in_the_wrong_order_is_found_too(kind, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=store_head_as(kind))
    rewrite_gguf(folder / "model.gguf", tensors=exchange_rows)
    assert "gguf-head-exchanged" in codes(inspect(str(folder)))


def test_a_head_of_its_own_breaks_nothing(copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=train_head)
    assert codes(inspect(str(folder))) == []


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
def test_a_head_that_is_no_numbers_is_compared_without_a_warning(kind, copy_of):
    folder = copy_of("reranker-gguf")
    rewrite_gguf(folder / "model.gguf", tensors=store_head_as(kind))

    def spoil(tensors):
        tensors[RANK_HEAD] = replace(tensors[RANK_HEAD], data=b"\xff\x7d" * (len(tensors[RANK_HEAD].data) // 2))

    rewrite_gguf(folder / "model.gguf", tensors=spoil)
    assert "gguf-head-exchanged" not in codes(inspect(str(folder)))


REPAIRED = [code for code in (*FIELDS, *TENSORS) if "repair-gguf" in CATALOGUE[code].remedy]


@pytest.mark.parametrize("code", REPAIRED)
def test_the_repair_that_is_named_mends_it(code, copy_of, made):
    folder = copy_of("reranker-gguf")
    broken, fixed = folder / "model.gguf", folder / "fixed.gguf"
    rewrite_gguf(broken, FIELDS[code][1] if code in FIELDS else None, TENSORS.get(code))
    base = str(made("reranker")) if "--base" in CATALOGUE[code].remedy else None
    repair_gguf(RepairOptions(broken=broken, output=fixed, base=base, task=Task.RERANK))
    assert codes(inspect(str(fixed))) == []
