"""The golden test: streaming writes, byte for byte, what the real ModelOpt writes."""

from __future__ import annotations

import json

import pytest
import torch

from qtool import resources
from qtool.export.quantize import QuantizeOptions, quantize
from tests.tiny import ODD, TEXT, read_bytes_of, text_config, vl_config, write_checkpoint

SCORE_HEAD = {
    "architecture": "Qwen3ForSequenceClassification",
    "id2label": {"0": "relevant"},
    "label2id": {"relevant": 0},
}


def hard_blocks(tensors):
    """Zero blocks, negative zeros, denormals and the type's own extremes, in every projection of layer 0."""
    for name, tensor in tensors.items():
        if ".layers.0." in name and name.endswith("_proj.weight"):
            limits = torch.finfo(tensor.dtype)
            tensor[0, :16] = 0
            tensor[1, :16] = -0.0
            tensor[2, :16] = limits.smallest_normal / 4
            tensor[3, 0], tensor[3, 1] = 1000.0, -1000.0
            tensor[4, :16] = 2.0**-14


def without_prefix(tensors):
    """The base-model layout of Qwen3-Embedding."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def without_head(tensors):
    del tensors["lm_head.weight"]


CASES = {
    "text-untied": (text_config(), {}),
    "text-tied": (text_config(tied=True), {}),
    "text-odd-shapes": (text_config(ODD), {}),
    "text-hard-blocks": (text_config(), {"change": hard_blocks}),
    "text-float16": (text_config(), {"dtype": "F16", "change": hard_blocks}),
    "text-float32": (text_config(), {"dtype": "F32", "change": hard_blocks}),
    "text-attention-bias": (text_config({**TEXT, "attention_bias": True}), {}),
    "text-score-head": (text_config(**SCORE_HEAD), {}),
    "text-base-model-names": (text_config(tied=True), {"change": without_prefix}),
    "text-untied-without-head": (text_config(), {"change": without_head}),
    "vl-tied": (vl_config(), {}),
    "vl-untied": (vl_config(tied=False), {}),
    "vl-odd-shapes": (vl_config(ODD), {"change": hard_blocks}),
    "vl-untied-without-head": (vl_config(tied=False), {"change": without_head}),
    "vl-sharded": (vl_config(), {"shards": 3}),
}


def both_backends(model, folder):
    for backend in ("streaming", "modelopt"):
        quantize(QuantizeOptions(model=str(model), output=folder / backend, backend=backend))
    return folder / "streaming", folder / "modelopt"


def assert_same_bytes(ours, theirs):
    our_tensors, their_tensors = read_bytes_of(ours), read_bytes_of(theirs)
    assert our_tensors.keys() == their_tensors.keys()
    different = [name for name in our_tensors if our_tensors[name] != their_tensors[name]]
    assert different == []


@pytest.mark.parametrize("case", CASES)
def test_both_backends_write_the_same_bytes(case, tmp_path):
    config, options = CASES[case]
    model = write_checkpoint(tmp_path / "source", config, **options)
    ours, theirs = both_backends(model, tmp_path)
    assert_same_bytes(ours, theirs)
    assert_same_files(ours, theirs)


@pytest.mark.parametrize("name", resources.demo_models())
def test_both_backends_write_the_same_bytes_for_the_demo_models(name, tmp_path):
    ours, theirs = both_backends(name, tmp_path)
    assert_same_bytes(ours, theirs)
    assert_same_files(ours, theirs)


@pytest.mark.parametrize("config", [text_config(), vl_config()], ids=["text", "vl"])
def test_both_backends_write_the_same_bytes_with_groups_kept(config, tmp_path):
    """ModelOpt shortens the names of what it leaves out; a whole layer stays here, and single groups of others."""
    model = write_checkpoint(tmp_path / "source", config)
    kept = tmp_path / "kept.yaml"
    groups = '  - groups: ["*.layers.0.*", "*.layers.1.self_attn.qkv_proj"]\n    reason: measured\n'
    kept.write_text(resources.path("recipes/nvfp4-w4a16.yaml").read_text().replace("keep:\n", f"keep:\n{groups}", 1))
    for backend in ("streaming", "modelopt"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / backend, backend=backend, recipe=str(kept)))
    assert_same_bytes(tmp_path / "streaming", tmp_path / "modelopt")
    assert_same_files(tmp_path / "streaming", tmp_path / "modelopt")
    before, after = read_bytes_of(model), read_bytes_of(tmp_path / "streaming")
    assert [name for name in after if ".layers.0." in name and after[name] != before.get(name)] == []


def assert_same_files(ours, theirs):
    """All files but the weights' containers and the manifest are the same; the manifests' errors agree."""

    def small(folder):
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return {p: b for p, b in files.items() if p.suffix != ".safetensors" and p.name != "qtool.json"}

    assert small(ours) == small(theirs)
    facts = [json.loads((folder / "qtool.json").read_text())["tensors"] for folder in (ours, theirs)]
    errors = [[tensor.pop("relative_error", 0) for tensor in each] for each in facts]
    assert facts[0] == facts[1]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


@pytest.mark.parametrize("config", [text_config(), text_config(**SCORE_HEAD), vl_config()], ids=["text", "score", "vl"])
def test_the_descriptions_are_modelopts_own(config, tmp_path):
    """Here nothing of qtool's backend runs: ModelOpt alone, with the recipe's patterns, exports and describes."""
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    from qtool.export.modelopt import modelopt_config
    from qtool.recipe import load_recipe

    source = write_checkpoint(tmp_path / "source", config)
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(source, dtype=torch.bfloat16)
    mtq.quantize(model, modelopt_config(load_recipe("nvfp4-w4a16").recipe), forward_loop=None)
    export_hf_checkpoint(model, export_dir=tmp_path / "modelopt")
    quantize(QuantizeOptions(model=str(source), output=tmp_path / "ours"))

    def read(folder, name):
        return json.loads((tmp_path / folder / name).read_text())

    assert read("ours", "hf_quant_config.json") == read("modelopt", "hf_quant_config.json")
    ours, theirs = read("ours", "config.json"), read("modelopt", "config.json")
    assert ours.pop("quantization_config") == theirs.pop("quantization_config")
    assert ours == json.loads((source / "config.json").read_text())
    assert_consistent(ours, theirs)


def assert_consistent(ours, theirs):
    """Whatever the source's config states, ModelOpt's says too (it adds transformers' defaults)."""
    for field, value in ours.items():
        if isinstance(value, dict):
            assert_consistent(value, theirs[field])
        else:
            assert theirs[field] == value, field
