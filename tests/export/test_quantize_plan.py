"""What the plan decides, and every reason for which there is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qtool.arch.detect import detect
from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.export.quantize_plan import Action, plan_quantization
from qtool.recipe import Keep, load_recipe
from qtool.storage.checkpoint import open_checkpoint
from tests.tiny import TEXT, text_config, vl_config, write_checkpoint

RECIPE = load_recipe("nvfp4-w4a16").recipe


def plan_of(folder, recipe=RECIPE):
    return plan_quantization(open_checkpoint(folder), detect(folder), recipe)


def fates(plan):
    return {tensor.spec.hf_name: tensor.action for tensor in plan.tensors}


def test_the_language_layers_are_quantized_and_all_else_is_kept(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, vl_config(tied=False)))
    for name, action in fates(plan).items():
        quantized = "language_model.layers" in name and name.endswith("_proj.weight")
        assert action is (Action.QUANTIZE if quantized else Action.COPY), name
    assert plan.exclude_modules == ("lm_head", "model.language_model.embed_tokens", "model.visual*")


def test_fused_groups_are_qkv_and_gate_up(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, text_config()))
    groups = {g: {t.spec.module.rpartition(".")[2] for t in members} for g, members in plan.groups.items()}
    assert groups["model.layers.1.self_attn.qkv_proj"] == {"q_proj", "k_proj", "v_proj"}
    assert groups["model.layers.1.mlp.gate_up_proj"] == {"gate_proj", "up_proj"}
    assert len(groups) == 8


def test_a_tied_checkpoint_that_repeats_its_head_loses_the_copy(tmp_path):
    def add_copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    plan = plan_of(write_checkpoint(tmp_path, text_config(tied=True), change=add_copy))
    assert fates(plan)["lm_head.weight"] is Action.DROP
    assert "lm_head.weight" not in {output.hf_name for output in plan.outputs}


def test_every_kept_tensor_has_its_reason(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, vl_config()))
    assert all(tensor.reason for tensor in plan.tensors)


def changed(change):
    return lambda folder: write_checkpoint(folder, text_config(), change=change)


def drop(name):
    return changed(lambda tensors: tensors.pop(name))


def put(name, tensor):
    return changed(lambda tensors: tensors.update({name: tensor}))


def with_config(**fields):
    return lambda folder: write_checkpoint(folder, text_config(**fields))


def without(field):
    def write(folder):
        write_checkpoint(folder, text_config())
        config = json.loads((folder / "config.json").read_text())
        del config[field]
        (folder / "config.json").write_text(json.dumps(config))

    return write


UP = "model.layers.0.mlp.up_proj.weight"
REFUSED = {
    "a missing tensor": (drop(UP), f"lacks {UP}"),
    "an unknown tensor": (
        put("model.layers.0.mystery.weight", torch.ones(2)),
        r"mystery\.weight \[2\] is not a tensor of",
    ),
    "a wrong shape": (
        put(UP, torch.ones(3, 64, dtype=torch.bfloat16)),
        r"has shape \[3, 64\]; config\.json implies \[128, 64\]",
    ),
    "a wrong type": (
        put(UP, torch.ones(128, 64, dtype=torch.int32)),
        f"{UP} has the type I32; expected one of BF16, F16, F32",
    ),
    "one type among others in a group": (put(UP, torch.ones(128, 64)), "have the types BF16 and F32"),
    "the same tensor under two names": (
        put("norm.weight", torch.ones(64, dtype=torch.bfloat16)),
        "are the same tensor",
    ),
    "a width that 16 does not divide": (
        lambda folder: write_checkpoint(folder, text_config({**TEXT, "intermediate_size": 120})),
        r"down_proj\.weight \[64, 120\] has 120 columns; expected a multiple of the block size 16",
    ),
    "no architectures": (without("architectures"), "no `architectures`"),
    "an unknown architecture": (with_config(), "Unknown architecture 'LlamaForCausalLM'"),
    "no hidden size": (without("hidden_size"), "hidden_size is missing or null"),
    "an already quantized source": (with_config(quantization_config={"quant_method": "modelopt"}), "already quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_plan_for(case, tmp_path):
    write, reason = REFUSED[case]
    write(tmp_path)
    if case == "an unknown architecture":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match=reason):
        plan_of(tmp_path)


def recipe_with(**changes):
    return RECIPE.model_copy(update=changes)


def keeping(*modules):
    return recipe_with(keep=[*RECIPE.keep, Keep(modules=list(modules), reason="a test")])


RECIPES = {
    "claims a module twice": (keeping("model.layers.0.mlp.up_proj"), "2 rules claim model.layers.0.mlp.up_proj"),
    "claims a module not at all": (recipe_with(keep=RECIPE.keep[1:]), "no rule claims lm_head"),
    "has a pattern that means nothing": (keeping("model.layers.*.mlp.upproj"), "matches no module of any known"),
    "quantizes what engines read unquantized": (
        recipe_with(quantize=[*RECIPE.quantize, "lm_head"], keep=RECIPE.keep[1:]),
        "quantizes lm_head, which every engine reads unquantized",
    ),
    "quantizes part of a fused group": (
        recipe_with(
            quantize=[p for p in RECIPE.quantize if "up" not in p],
            keep=[*RECIPE.keep, Keep(modules=["*.mlp.up_proj"], reason="a test")],
        ),
        "quantizes part of model.layers.0.mlp.gate_up_proj",
    ),
    "matches nothing here": (
        recipe_with(quantize=[*RECIPE.quantize, "model.language_model.layers.*.mlp.up_proj"]),
        "matches nothing in this checkpoint",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_no_plan_under_a_recipe_that(case, tmp_path):
    recipe, reason = RECIPES[case]
    with pytest.raises(UsageError, match=reason):
        plan_of(write_checkpoint(tmp_path, text_config()), recipe)


def test_a_layer_kept_by_a_recipe_of_ones_own_is_excluded_by_name(tmp_path):
    quantize = [pattern.replace("*.", "model.layers.[!0].", 1) for pattern in RECIPE.quantize]
    recipe = recipe_with(
        quantize=quantize, keep=[*RECIPE.keep, Keep(modules=["model.layers.0.*_proj"], reason="a test")]
    )
    plan = plan_of(write_checkpoint(tmp_path, text_config()), recipe)
    assert "model.layers.0.mlp.up_proj" in plan.exclude_modules
    assert "model.layers.1.mlp.up_proj" not in plan.exclude_modules
    assert len(plan.groups) == 4


SIDE_FILES = {
    "a LogitScore module": (
        {"modules.json": [{"type": "sentence_transformers.cross_encoder.LogitScore"}]},
        Task.RERANK,
        "modules.json",
    ),
    "a Pooling module": (
        {"modules.json": [{"type": "a.Transformer"}, {"type": "a.Pooling"}]},
        Task.EMBED,
        "modules.json",
    ),
    "a model type": (
        {"config_sentence_transformers.json": {"model_type": "CrossEncoder"}},
        Task.RERANK,
        "config_sentence",
    ),
    "modules before the model type": (
        {"modules.json": [{"type": "a.Pooling"}], "config_sentence_transformers.json": {"model_type": "CrossEncoder"}},
        Task.EMBED,
        "modules.json",
    ),
    "nothing": ({}, None, "nothing"),
}


@pytest.mark.parametrize("case", SIDE_FILES)
def test_the_task_is_declared_by(case, tmp_path):
    files, task, source = SIDE_FILES[case]
    write_checkpoint(tmp_path / "some-reranker-embedding", text_config())
    for name, content in files.items():
        (tmp_path / "some-reranker-embedding" / name).write_text(json.dumps(content))
    detection = detect(tmp_path / "some-reranker-embedding")
    assert detection.task is task
    assert source in detection.task_source
    assert detect(tmp_path / "some-reranker-embedding", Task.EMBED).task is Task.EMBED
    if task is None:
        with pytest.raises(UsageError, match="reranker or an embedder"):
            detection.require_task()


def test_a_score_head_declares_a_reranker(tmp_path):
    write_checkpoint(tmp_path, text_config(architecture="Qwen3ForSequenceClassification", num_labels=1))
    assert detect(tmp_path).task is Task.RERANK


def test_bits_per_weight_count_scales_and_kept_weights(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, text_config()))
    quantized = sum(t.elements for t in plan.tensors if t.action is Action.QUANTIZE)
    kept = sum(t.elements for t in plan.tensors if t.action is Action.COPY)
    scales = 32 * sum(t.action is Action.QUANTIZE for t in plan.tensors)
    assert plan.bits_per_weight == pytest.approx((4.5 * quantized + 16 * kept + scales) / (quantized + kept))


def test_plans_are_frozen(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, text_config()))
    assert replace(plan) == plan
    with pytest.raises(AttributeError):
        plan.tensors = ()


def keeping(*patterns):
    return RECIPE.model_copy(update={"keep": [*RECIPE.keep, Keep(groups=list(patterns), reason="measured")]})


def test_a_kept_group_is_taken_out_of_quantize_whole(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, vl_config(tied=False)), keeping("*.layers.0.self_attn.qkv_proj"))
    kept = [t for t in plan.tensors if t.spec.fused_group and t.action is Action.COPY]
    assert {t.spec.module.rpartition(".")[2] for t in kept} == {"q_proj", "k_proj", "v_proj"}
    assert {(t.rule, t.reason) for t in kept} == {("*.layers.0.self_attn.qkv_proj", "measured")}
    # SGLang renames names of the decoder and finds them no more; the pattern survives.
    assert {"model.language_model.layers.0.self_attn.q_proj", "*.layers.0.self_attn.q*_proj"} <= set(
        plan.exclude_modules
    )


def test_a_pattern_whose_modules_are_all_kept_is_no_mistake(tmp_path):
    plan = plan_of(write_checkpoint(tmp_path, text_config()), keeping("*.mlp.down_proj"))
    assert not [t for t in plan.tensors if "down_proj" in t.spec.module and t.action is Action.QUANTIZE]
    assert not any("*" in name for name in plan.exclude_modules)  # of a text model nothing is renamed


@pytest.mark.parametrize(
    ("pattern", "message", "hint"),
    [
        (
            "*.layers.0.self_attn.q_proj",
            "matches no fused group",
            "merge that module into model.layers.0.self_attn.qkv_proj",
        ),
        ("*.layers.7.mlp.down_proj", "matches no fused group", "Groups are named as model.layers.0"),
    ],
)
def test_a_kept_group_that_is_none_is_refused(pattern, message, hint, tmp_path):
    with pytest.raises(UsageError, match=message) as refused:
        plan_of(write_checkpoint(tmp_path, text_config()), keeping(pattern))
    assert hint in refused.value.hint
