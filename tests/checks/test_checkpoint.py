"""Each way to break a safetensors checkpoint gives its one code; a healthy one gives none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qtool.arch.spec import Task
from qtool.checks.inspect import inspect
from qtool.errors import ModelError
from tests.checks.conftest import edit_json
from tests.checks.rewriting import codes, rewrite_safetensors

LAYER = "model.language_model.layers.0."
QUERY = f"{LAYER}self_attn.q_proj"
HEAD = "lm_head"
EMBEDDING = "model.language_model.embed_tokens"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def delete(name):
    return lambda folder: (folder / name).unlink()


def configure(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def in_text(**changes):
    return lambda folder: edit_json(folder / "config.json", text_config=config_of(folder)["text_config"] | changes)


def in_tensors(change):
    return lambda folder: rewrite_safetensors(folder, change)


def renamed_split(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"Split"', '"Punctuation"'))


def without_yes(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["[yes]"] = tokenizer["model"]["vocab"].pop("yes")
    path.write_text(json.dumps(tokenizer))


def without_deepstack(folder):
    vision = config_of(folder)["vision_config"] | {"deepstack_visual_indexes": [0, 1, 1, 1, 1]}
    edit_json(folder / "config.json", vision_config=vision)


PLAIN = {
    "safetensors-foreign": ("reranker", configure("config.json", architectures=["LlamaForCausalLM"])),
    "safetensors-missing-tensor": ("reranker", in_tensors(lambda t: t.pop(f"{QUERY}.weight"))),
    "safetensors-unknown-tensor": ("reranker", in_tensors(lambda t: t.update(extra=torch.zeros(2)))),
    "safetensors-tensor-shape": (
        "reranker", in_tensors(lambda t: t.update({f"{QUERY}.weight": t[f"{QUERY}.weight"][:8].clone()})),
    ),
    "safetensors-tensor-type": (
        "reranker", in_tensors(lambda t: t.update({f"{QUERY}.weight": t[f"{QUERY}.weight"].to(torch.int8)})),
    ),
    "safetensors-rope": ("reranker", in_text(rope_theta=None)),
    "safetensors-pooling": ("embedder", configure("1_Pooling/config.json", pooling_mode="mean")),
    "safetensors-pre-tokenizer": ("reranker", renamed_split),
    "safetensors-no-yes-no-token": ("reranker", without_yes),
    "safetensors-answer-ids": ("reranker", configure("1_LogitScore/config.json", true_token_id=527, false_token_id=517)),
    "safetensors-missing-tokenizer": ("reranker", delete("tokenizer.json")),
    "safetensors-missing-tokenizer-config": ("reranker", delete("tokenizer_config.json")),
    "safetensors-missing-chat-template": ("reranker", delete("chat_template.jinja")),
    "safetensors-missing-preprocessor": ("reranker", delete("preprocessor_config.json")),
    "safetensors-missing-module": ("reranker", lambda folder: shutil.rmtree(folder / "1_LogitScore")),
    "safetensors-missing-sentence-transformers-config": ("reranker", delete("sentence_bert_config.json")),
}  # fmt: skip
"""By code: the checkpoint to break and what does it."""


def scale_of(module, value):
    return in_tensors(lambda tensors: tensors.update({f"{module}.weight_scale_2": value}))


def unpack(folder):
    def change(tensors):
        rows, packed = tensors[f"{QUERY}.weight"].shape
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            del tensors[f"{QUERY}.{suffix}"]
        tensors[f"{QUERY}.weight"] = torch.zeros(rows, 2 * packed, dtype=torch.bfloat16)

    rewrite_safetensors(folder, change)
    exclude(QUERY)(folder)


def unpack_down(folder):
    module = f"{LAYER}mlp.down_proj"

    def change(tensors):
        rows, packed = tensors[f"{module}.weight"].shape
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            del tensors[f"{module}.{suffix}"]
        tensors[f"{module}.weight"] = torch.zeros(rows, 2 * packed, dtype=torch.bfloat16)

    rewrite_safetensors(folder, change)


def keep_by_name(folder):
    unpack_down(folder)
    exclude(f"{LAYER}mlp.down_proj")(folder)


def pack_embedding(folder):
    def change(tensors):
        rows, columns = tensors[f"{EMBEDDING}.weight"].shape
        tensors[f"{EMBEDDING}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors[f"{EMBEDDING}.weight_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        tensors[f"{EMBEDDING}.weight_scale_2"] = torch.tensor(1.0)

    rewrite_safetensors(folder, change)
    exclude(without=EMBEDDING)(folder)


def exclude(*more, without=""):
    """Change the excluded modules in both files."""

    def change(folder):
        declared = config_of(folder)["quantization_config"]
        modules = [name for name in declared["ignore"] if name != without] + list(more)
        edit_json(folder / "config.json", quantization_config=declared | {"ignore": modules})
        edit_hf_quant_config(folder, exclude_modules=modules)

    return change


def edit_hf_quant_config(folder, **changes):
    path = folder / "hf_quant_config.json"
    edit_json(path, quantization=json.loads(path.read_text())["quantization"] | changes)


def quantize_activations(folder):
    def change(tensors):
        scales = [name for name in tensors if name.endswith(".weight_scale_2")]
        tensors.update({name.replace(".weight_scale_2", ".input_scale"): torch.tensor(0.01) for name in scales})

    rewrite_safetensors(folder, change)
    declared = config_of(folder)["quantization_config"] | {"quant_algo": "NVFP4"}
    edit_json(folder / "config.json", quantization_config=declared)
    edit_hf_quant_config(folder, quant_algo="NVFP4")


NVFP4 = {
    "nvfp4-missing-scale": in_tensors(lambda t: t.pop(f"{QUERY}.weight_scale_2")),
    "nvfp4-scale-type": in_tensors(
        lambda t: t.update({f"{QUERY}.weight_scale": t[f"{QUERY}.weight_scale"].view(torch.uint8)})
    ),
    "nvfp4-scale-shape": scale_of(QUERY, torch.ones(2)),
    "nvfp4-bad-scale": scale_of(QUERY, torch.tensor(-1.0)),
    "nvfp4-unequal-scales": scale_of(QUERY, torch.tensor(0.5)),
    "nvfp4-partial-group": unpack,
    "nvfp4-quantized-head": pack_embedding,
    "nvfp4-activations": quantize_activations,
    "nvfp4-no-quantization-config": configure("config.json", quantization_config=None),
    "nvfp4-no-hf-quant-config": delete("hf_quant_config.json"),
    "nvfp4-config-mismatch": lambda folder: edit_hf_quant_config(folder, quant_algo="FP8"),
    "nvfp4-group-size": lambda folder: edit_hf_quant_config(folder, group_size=32),
    "excluded-modules-missing": unpack_down,
    "excluded-modules-renamed": keep_by_name,
    "excluded-modules-packed": exclude(f"{LAYER}mlp.down_proj"),
}
"""By code: what breaks the quantized reranker so."""

CODES = {*PLAIN, *NVFP4} | {
    "safetensors-task-undeclared", "safetensors-missing-modules-json", "safetensors-deepstack",
    "excluded-modules-pattern",
}  # fmt: skip
"""Every code that this file tests."""


@pytest.mark.parametrize("name", ["reranker", "embedder", "text-reranker", "text-embedder"])
@pytest.mark.parametrize("suffix", ["", "-nvfp4"])
def test_a_healthy_checkpoint_has_nothing_to_complain_about(name, suffix, made):
    report = inspect(str(made(name + suffix)))
    assert codes(report) == []
    (artefact,) = report.artefacts
    assert artefact.kind == "safetensors"
    assert artefact.task == ("rerank" if "reranker" in name else "embed")
    if suffix:
        assert artefact.format == "W4A16_NVFP4"
        assert next(each for each in artefact.classes if each.name == "attention").types == {
            "NVFP4": 8 if "text" in name else 16
        }


@pytest.mark.parametrize(("code", "name", "change"), [(code, *each) for code, each in PLAIN.items()])
def test_what_is_wrong_with_a_checkpoint_is_found(code, name, change, copy_of):
    folder = copy_of(name)
    change(folder)
    assert codes(inspect(str(folder))) == [code]


@pytest.mark.parametrize(("code", "change"), NVFP4.items())
def test_what_is_wrong_with_a_quantized_checkpoint_is_found(code, change, copy_of):
    folder = copy_of("reranker-nvfp4")
    change(folder)
    assert codes(inspect(str(folder))) == [code]


def test_without_modules_json_the_head_is_random_and_the_task_may_be_undeclared(copy_of):
    folder = copy_of("reranker")
    (folder / "modules.json").unlink()
    assert codes(inspect(str(folder))) == ["safetensors-missing-modules-json"]
    (folder / "config_sentence_transformers.json").unlink()
    report = inspect(str(folder))
    assert codes(report) == ["safetensors-task-undeclared", "safetensors-missing-modules-json"]
    assert not report.broken
    assert codes(inspect(str(folder), Task.RERANK)) == ["safetensors-missing-modules-json"]


def test_more_deepstack_layers_than_layers(copy_of):
    folder = copy_of("reranker")
    without_deepstack(folder)
    assert set(codes(inspect(str(folder)))) == {"safetensors-deepstack", "safetensors-missing-tensor"}


@pytest.mark.parametrize("pattern", ["model.visual", "model.visual.*"])
def test_the_vision_tower_is_excluded_by_the_one_pattern_that_all_engines_match(pattern, copy_of):
    folder = copy_of("reranker-nvfp4")
    exclude(pattern, without="model.visual*")(folder)
    assert codes(inspect(str(folder))) == ["excluded-modules-pattern"]


def test_an_excluded_head_that_is_not_listed_is_expected_packed(copy_of):
    folder = copy_of("text-reranker-nvfp4")
    exclude(without=HEAD)(folder)
    (finding,) = inspect(str(folder)).findings
    assert finding.code == "excluded-modules-missing"
    assert finding.sentence.startswith("lm_head is neither quantized nor excluded")


def test_a_lone_hf_quant_config_is_not_enough(copy_of):
    folder = copy_of("reranker-nvfp4")
    edit_json(folder / "config.json", quantization_config=None)
    report = inspect(str(folder))
    assert report.broken
    assert report.artefacts[0].markers["excluded modules"].endswith("model.visual*")


def test_another_quantization_is_named_and_left_alone(copy_of):
    folder = copy_of("reranker")
    rewrite_safetensors(folder, lambda t: t.update({f"{QUERY}.qweight": t.pop(f"{QUERY}.weight").to(torch.int32)}))
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    (finding,) = inspect(str(folder)).findings
    assert finding.code == "safetensors-foreign"
    assert "quantized by gptq" in finding.sentence


def test_one_weight_file_stands_for_its_checkpoint(made):
    folder = made("reranker")
    assert inspect(str(folder / "model.safetensors")).artefacts == inspect(str(folder)).artefacts


def test_a_corrupt_weight_file_is_an_error(copy_of):
    folder = copy_of("reranker")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        inspect(str(folder))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"rope_parameters": 5}),
        ("config.json", {"num_hidden_layers": 1 << 40}),
        ("config.json", {"rope_parameters": {"rope_theta": "high", "mrope_section": 7}}),
        ("config.json", {"quantization_config": [1]}),
        ("config.json", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": 5}}),
        ("1_LogitScore/config.json", {"true_token_id": [None]}),
        ("tokenizer.json", {"pre_tokenizer": [1], "model": "words"}),
        ("tokenizer.json", {"pre_tokenizer": {"pretokenizers": [1, {"type": "Split", "pattern": "x"}]}}),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-nvfp4"])
def test_nonsense_in_a_file_is_survived(name, changes, suffix, copy_of):
    folder = copy_of(f"text-reranker{suffix}")
    edit_json(folder / name, **changes)
    inspect(str(folder)).to_dict()


def test_nonsense_in_lists_is_survived(copy_of):
    folder = copy_of("reranker-nvfp4")
    (folder / "modules.json").write_text('[1, {"path": 5, "type": "x.Pooling"}]')
    (folder / "hf_quant_config.json").write_text('{"quantization": [1]}')
    inspect(str(folder)).to_dict()


def test_deepstack_layers_that_are_none_are_found(copy_of):
    folder = copy_of("reranker")
    edit_json(
        folder / "config.json", vision_config=config_of(folder)["vision_config"] | {"deepstack_visual_indexes": 3}
    )
    (finding,) = inspect(str(folder)).findings
    assert finding.sentence == "config.json: vision_config.deepstack_visual_indexes is 3, expected a list of layers."
