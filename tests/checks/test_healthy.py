"""A healthy artefact of every type passes every stage, whatever its weights: no false alarms."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from qtool import resources
from qtool.arch.prompts import VL_RERANKER
from qtool.checks.stage import Outcome
from qtool.errors import ModelError, UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.formats.ggml import GGML_TYPES
from qtool.formats.nvfp4 import block_scale_codes
from qtool.inputs.items import Item, Pair
from qtool.scoring.runtime import open_runtime
from tests.checks import surgery
from tests.checks.good import append_end, make, write_reference
from tests.checks.stages import check_structure, compare_prompts, compare_weights, rederive
from tests.checks.weight_cases import DOWN, LAYER
from tests.checks.weight_change_cases import encode_under, plain, requantize, rounded
from tests.export.models import RERANKER

KINDS = ("copy", "nvfp4", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0")
TEXT_KINDS = (*KINDS, "gguf-nvfp4")
"""llama.cpp drops scales of the vision family's NVFP4, and the inspection warns of it."""
FORMS = (("vl", "rerank"), ("vl", "embed"), ("text", "rerank"), ("tied-text", "embed"))


def passes(stage):
    """Whether a stage passed without a word."""
    return (stage.outcome, stage.findings) == (Outcome.PASS, ())


@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarm(seed, tmp_path):
    form, task = FORMS[seed % len(FORMS)]
    reference = write_reference(tmp_path / "reference", form, task=task, seed=seed, shards=1 + seed % 3)
    if form == "tied-text":
        append_end(reference)
    for place, kind in enumerate(KINDS if form == "vl" else TEXT_KINDS):
        artefact = make(reference, tmp_path / kind, kind)
        assert passes(check_structure(artefact, reference)), kind
        stage, errors = compare_weights(artefact, reference)
        assert passes(stage), kind
        assert errors[0].relative_error == max(each.relative_error for each in errors)
        assert all(each.relative_error <= each.bound for each in errors)
        if place % 3 == seed % 3:  # bytes do not depend on chance
            stage, table = rederive(artefact, reference, tmp_path)
            assert passes(stage), kind
            assert all(each.is_equal for each in table)


QUESTIONS = [Pair(Item("q", ("a red ball",)), Item("d", text)) for text in (("a ball",), ("größer 红色 🔴",), ())]


@pytest.mark.parametrize("kind", ["nvfp4", "gguf-f16"])
def test_a_healthy_runtime_reads_the_official_prompt(kind, builder):
    reference = builder.reference("reranker")
    with closing(open_runtime(str(builder.good(f"reranker/{kind}")))) as artefact:
        assert passes(compare_prompts(open_runtime(str(reference)), artefact, QUESTIONS, reference, kind))


def test_llama_cpp_reads_the_template_that_the_file_bakes(builder, tmp_path):
    reference = builder.reference("reranker")
    convert_gguf(
        ConvertOptions(
            model=str(reference), output=tmp_path / "m.gguf", outtypes=("f16",), mmproj="none", prompt="llamacpp"
        )
    )
    with closing(open_runtime(str(tmp_path / "m.gguf"))) as artefact:
        stage = compare_prompts(open_runtime(str(reference)), artefact, QUESTIONS[:1], reference, "m.gguf")
    assert [each.code for each in stage.findings] == ["prompt-text-template"]


def codes(stage):
    return stage.outcome, [each.code for each in stage.findings]


def copy_of(builder, name, tmp_path):
    return shutil.copytree(builder.good(name), tmp_path / "artefact")


@pytest.mark.parametrize(
    ("code", "name", "change"),
    [
        (
            "other-length", "reranker/copy",
            lambda f: surgery.config(f, lambda c: c["text_config"].update(max_position_embeddings=99)),
        ),
        ("other-minor-file", "reranker/copy", lambda f: (f / "generation_config.json").write_text("{}")),
        (
            "other-special-tokens", "reranker/copy",
            lambda f: surgery.edit(f / "tokenizer_config.json", lambda c: c.update(pad_token="<|im_end|>")),
        ),
        (
            "tokenizer-own-length", "reranker/copy",
            lambda f: surgery.edit(f / "tokenizer.json", lambda t: t.update(
                truncation={"max_length": 64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"})),
        ),
        (
            "tokenizer-own-length", "embedder/nvfp4",
            lambda f: surgery.edit(f / "tokenizer.json", lambda t: t.update(
                padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 753,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"})),
        ),
        (
            "other-chat-template", "embedder/gguf-f16",
            lambda f: surgery.field(f, "tokenizer.chat_template", lambda _: "{{ messages }}"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_may_be_meant_so_is_a_warning(code, name, change, builder, tmp_path):
    artefact = copy_of(builder, name, tmp_path)
    change(artefact)
    assert codes(check_structure(artefact, builder.reference(name.partition("/")[0]))) == (Outcome.PASS, [code])


def test_a_field_that_qtool_does_not_know_is_a_warning(builder, tmp_path):
    artefact = copy_of(builder, "reranker/copy", tmp_path)
    surgery.config(artefact, lambda config: config["text_config"].update(attention_chunks=2))
    stage = check_structure(artefact, builder.reference("reranker"))
    assert codes(stage) == (Outcome.PASS, ["unknown-field"])
    assert "text_config.attention_chunks = 2" in stage.findings[0].sentence


def test_a_quantization_that_qtool_does_not_read_is_inconclusive(builder, tmp_path):
    artefact = copy_of(builder, "reranker/copy", tmp_path)

    def pack(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).data.shape
            tensors[f"{name}_packed"] = surgery.Raw("I32", np.zeros((rows, columns // 8), np.int32))

    surgery.weights(artefact, pack)
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    surgery.config(artefact, lambda config: config.update(quantization_config=declared))
    stage = check_structure(artefact, builder.reference("reranker"))
    assert codes(stage) == (Outcome.INCONCLUSIVE, ["safetensors-foreign", "unread-quantization"])


def test_a_narrower_type_is_a_warning_and_its_rounding_is_allowed(builder, tmp_path):
    artefact = copy_of(builder, "reranker/copy", tmp_path)

    def narrow(tensors):
        for name, raw in tensors.items():
            values = (raw.data.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = surgery.Raw("F16", values.astype(np.float16))

    surgery.weights(artefact, narrow)
    surgery.config(artefact, lambda config: config.update(dtype="float16"))
    reference = builder.reference("reranker")
    assert codes(check_structure(artefact, reference)) == (Outcome.PASS, ["narrower-type"])
    assert passes(compare_weights(artefact, reference)[0])


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_a_type_of_llama_cpp_is_held_to_its_bits(kind, builder, tmp_path):
    artefact = copy_of(builder, "reranker/gguf-f16", tmp_path)
    name, number = "blk.1.ffn_down.weight", GGMLQuantizationType[kind]

    def requantize(tensors):
        values = np.frombuffer(tensors[name].data, np.float16).astype(np.float32).reshape(tensors[name].output.shape)
        made = tensors[name].changed(type=GGML_TYPES[number])
        tensors[name] = replace(made, data=quantize(values, number).tobytes())

    surgery.gguf(artefact, tensors=requantize)
    stage, errors = compare_weights(artefact, builder.reference("reranker"))
    assert passes(stage)
    assert (errors[0].tensor, errors[0].format) == (name, kind)
    assert 0.3 < errors[0].relative_error / errors[0].bound < 0.6  # measured 0.36 and 0.46


def test_a_type_that_nothing_here_reads_is_not_compared_and_alone_proves_nothing(builder, tmp_path):
    artefact, unread = copy_of(builder, "reranker/gguf-f16", tmp_path), GGML_TYPES[GGMLQuantizationType.Q1_0]

    def retype(tensors):
        tensors["blk.1.ffn_down.weight"] = tensors["blk.1.ffn_down.weight"].changed(type=unread)

    def rename(tensors):
        tensors.update(
            {f"other.{name}": tensors.pop(name).changed(gguf_name=f"other.{name}") for name in list(tensors)}
        )

    surgery.gguf(artefact, tensors=retype)
    stage, errors = compare_weights(artefact, builder.reference("reranker"))
    assert codes(stage) == (Outcome.PASS, ["weights-not-compared"])
    assert "blk.1.ffn_down.weight" not in {each.tensor for each in errors}
    for file in artefact.glob("*.gguf"):
        surgery.gguf(artefact, tensors=rename, name=file.name)
    stage, errors = compare_weights(artefact, builder.reference("reranker"))
    assert (codes(stage), errors) == ((Outcome.INCONCLUSIVE, []), ())


def test_few_packed_weights_are_a_warning(builder, tmp_path):
    reference = builder.reference("reranker")
    artefact = make(reference, tmp_path / "artefact", "nvfp4")
    plain = surgery.read_weights(reference / "model.safetensors")
    unpacked = [f"model.language_model.layers.{layer}.{part}" for layer in range(3)
                for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")]  # fmt: skip

    def unpack(tensors):
        for module in unpacked:
            for suffix in (".weight_scale", ".weight_scale_2"):
                del tensors[module + suffix]
            tensors[f"{module}.weight"] = plain[f"{module}.weight"]

    surgery.weights(artefact, unpack)
    patterns = surgery.read_json(artefact / "config.json")["quantization_config"]["ignore"] + unpacked
    surgery.config(artefact, lambda config: config["quantization_config"].update(ignore=patterns))
    surgery.edit(artefact / "hf_quant_config.json", lambda c: c["quantization"].update(exclude_modules=patterns))
    found = ["excluded-modules-renamed", "mostly-unquantized"]
    assert codes(check_structure(artefact, reference)) == (Outcome.PASS, found)
    assert passes(compare_weights(artefact, reference)[0])


def undeclared(artefact):
    """The artefact without what says how it was made."""
    (artefact / "qtool.json").unlink()
    return artefact


def under_scales(tensors, module, values, factor):
    """The nearest codes of `values` under block scales whose largest values are 6 / `factor`."""
    scale = tensors[f"{module}.weight_scale_2"].data
    blocks = values.reshape(-1, 16)
    scales = block_scale_codes(np.abs(blocks).max(axis=1) * np.float32(factor), scale)
    packed, _ = encode_under(blocks, scales, scale)
    for name, data in (("weight", packed), ("weight_scale", scales)):
        raw = tensors[f"{module}.{name}"]
        tensors[f"{module}.{name}"] = raw.holding(data.reshape(raw.data.shape))


@pytest.mark.parametrize("factor", [1.5, 0.86, 1.2])
def test_scales_of_a_search_are_no_damage(factor, builder, tmp_path):
    """Four-over-six, and scales a sixth smaller or a fifth larger: codes are the nearest under each."""
    artefact = undeclared(copy_of(builder, "reranker/nvfp4", tmp_path))
    values = plain(builder, f"{DOWN}.weight")
    surgery.weights(artefact, lambda tensors: under_scales(tensors, DOWN, values, factor))
    stage, _ = compare_weights(artefact, builder.reference("reranker"))
    assert codes(stage) == (Outcome.PASS, ["scales-searched"])


@pytest.mark.parametrize("seed", range(3))
def test_what_may_be_another_algorithm_is_a_warning(seed, builder, tmp_path):
    """Every matrix has a third of its codes moved by one step, as algorithms do that make up for errors elsewhere."""
    artefact = undeclared(copy_of(builder, "reranker/nvfp4", tmp_path))

    def compensate(tensors):
        random = np.random.default_rng(seed)
        for name, raw in tensors.items():
            if raw.dtype == "U8":
                data = raw.data.copy()
                down = random.random(data.shape) < 0.3
                data[down & (data & 7 > 1)] -= 1
                tensors[name] = raw.holding(data)

    surgery.weights(artefact, compensate)
    stage, errors = compare_weights(artefact, builder.reference("reranker"))
    assert stage.outcome is Outcome.PASS
    assert {each.code for each in stage.findings} == {"blocks-otherwise-rounded"}
    assert errors[0].relative_error <= errors[0].bound


@pytest.mark.parametrize("seed", range(3))
def test_a_scaled_pair_is_undecided(seed, builder, tmp_path):
    """The columns of gate and up are scaled, and the norm before them by the inverse, as AWQ does."""
    artefact = undeclared(copy_of(builder, "reranker/nvfp4", tmp_path))
    norm = f"{LAYER}post_attention_layernorm.weight"
    factors = 2 ** np.random.default_rng(seed).uniform(-1, 1, 64).astype(np.float32)

    def divide(tensors):
        tensors[norm] = tensors[norm].holding(rounded(plain(builder, norm) / factors))

    requantize(artefact, {f"{LAYER}mlp.{each}": plain(builder, f"{LAYER}mlp.{each}.weight") * factors
                          for each in ("gate_proj", "up_proj")})  # fmt: skip
    surgery.weights(artefact, divide)
    stage, _ = compare_weights(artefact, builder.reference("reranker"))
    assert codes(stage) == (Outcome.PASS, ["weights-prescaled", "weights-prescaled"])


def test_an_artefact_without_a_manifest_is_rederived_by_the_default_recipe(builder, tmp_path):
    artefact = copy_of(builder, "reranker/nvfp4", tmp_path)
    (artefact / "qtool.json").unlink()
    stage, table = rederive(artefact, builder.reference("reranker"), tmp_path)
    assert codes(stage) == (Outcome.PASS, ["recipe-assumed"])
    assert "model.safetensors" in {row.name for row in table}


def test_other_shards_and_another_config_are_the_same_tensors(builder, tmp_path):
    artefact = copy_of(builder, "reranker/nvfp4", tmp_path)
    tensors = surgery.read_weights(artefact / "model.safetensors")
    (artefact / "model.safetensors").unlink()
    shards = {}
    for number, part in enumerate(np.array_split(list(tensors), 2), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        surgery.write_weights(artefact / name, {each: tensors[each] for each in part.tolist()})
        shards |= dict.fromkeys(part.tolist(), name)
    (artefact / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    surgery.config(artefact, lambda config: config.update(transformers_version="9"))
    stage, table = rederive(artefact, builder.reference("reranker"), tmp_path)
    assert codes(stage) == (Outcome.PASS, ["files-not-rederived"])
    assert {row.name for row in table if not row.is_equal} == {"config.json"}
    assert len(table) > len(tensors)


def test_a_chosen_instruction_that_the_manifest_declares_is_no_fault(builder, tmp_path):
    reference, file = builder.reference("reranker"), tmp_path / "m.gguf"
    convert_gguf(ConvertOptions(model=str(reference), output=file, outtypes=("f16",), instruction="Find birds."))
    stage = check_structure(file, reference)
    assert codes(stage) == (Outcome.PASS, ["gguf-own-instruction"])
    stage, _ = rederive(file, reference, tmp_path)
    assert codes(stage) == (Outcome.PASS, ["fields-not-rederived"])


def test_the_prompt_of_the_other_family_is_named(tmp_path):
    reference = write_reference(tmp_path / "text", "text", seed=6)
    reader = open_runtime(str(reference))
    stage = compare_prompts(reader, reader.under(VL_RERANKER), QUESTIONS[:1], reference, "MODEL")
    assert [each.code for each in stage.findings] == ["prompt-vision-template"]


def test_a_quantized_reference_and_several_models_are_refused(builder, tmp_path):
    quantized = builder.good("reranker/nvfp4")
    with pytest.raises(UsageError, match=r"The reference .* is quantized"):
        check_structure(quantized, quantized)
    folder = copy_of(builder, "reranker/gguf-f16", tmp_path)
    shutil.copyfile(folder / "model.gguf", folder / "other.gguf")
    with pytest.raises(UsageError, match=r"model\.gguf, other\.gguf"):
        check_structure(folder, builder.reference("reranker"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither config\.json nor GGUF"):
        check_structure(tmp_path / "empty", builder.reference("reranker"))


def test_the_demo_model_is_itself():
    demo = resources.demo_model(RERANKER)
    assert passes(check_structure(demo, demo))
    assert passes(compare_weights(demo, demo)[0])
