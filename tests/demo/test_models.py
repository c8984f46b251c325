"""What ships: every file, under the real names, and scores that mean something."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen3VLConfig

from qtool.arch.prompts import VL_EMBEDDER
from qtool.inputs.builtin import find_panel
from qtool.inputs.panels import load_panel
from qtool.jsonfile import read_json
from qtool.scoring.transformers.runtime import TransformersScorer, open_scorer
from tools.demo_models.checkpoint import chat_template, model_config, model_folder, write_sidecars
from tools.demo_models.evaluate import OPTIONS, TASKS, measure
from tools.demo_models.tokenizer import build_tokenizer

FOLDERS = {task: model_folder(task) for task in TASKS}
COMMON = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "model.safetensors",
    "modules.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}
OWN = {"reranker": {"1_LogitScore/config.json"}, "embedder": {"1_Pooling/config.json", "2_Normalize/config.json"}}
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "demo.md"
both = pytest.mark.parametrize("task", list(FOLDERS))


@both
def test_every_file_is_there_and_no_other(task: str) -> None:
    files = {str(path.relative_to(FOLDERS[task])) for path in FOLDERS[task].rglob("*") if path.is_file()}
    assert files == COMMON | OWN[task]
    assert sum(path.stat().st_size for path in FOLDERS[task].rglob("*")) <= 11_000_000


@both
def test_the_side_files_are_what_the_script_writes(task: str, tmp_path: Path) -> None:
    write_sidecars(build_tokenizer(), task, tmp_path)
    written = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written.keys() == COMMON - {"README.md", "model.safetensors"} | OWN[task]
    for name, content in written.items():
        assert (FOLDERS[task] / name).read_bytes() == content, name


@both
def test_the_documentation_shows_the_numbers_of_the_cards(task: str) -> None:
    rows = [line for line in (FOLDERS[task] / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert "\n".join([rows[0], "|---|" + "---:|" * (rows[0].count("|") - 2), *rows[1:]]) in DOCUMENTATION.read_text()


@both
def test_the_config_is_the_real_architecture_with_widths_that_every_format_divides(task: str) -> None:
    config = read_json(FOLDERS[task] / "config.json")
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    assert text["hidden_size"] % 256 == text["intermediate_size"] % 256 == 0
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert sum(text["rope_scaling"]["mrope_section"]) * 2 == text["head_dim"]
    assert vision["deepstack_visual_indexes"]
    assert vision["out_hidden_size"] == text["hidden_size"]
    assert Qwen3VLConfig.from_pretrained(FOLDERS[task]).text_config.rope_parameters["mrope_interleaved"]


@both
def test_the_weights_are_bf16_under_the_real_names_and_finite(task: str) -> None:
    with safe_open(FOLDERS[task] / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        for name in names:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert tensor.isfinite().all(), name
    layer = "model.language_model.layers.3."
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        assert f"{layer}self_attn.{part}.weight" in names
    assert {"model.language_model.embed_tokens.weight", "model.visual.deepstack_merger_list.1.linear_fc2.bias"} <= names
    assert all(name.startswith(("model.language_model.", "model.visual.")) for name in names)


def test_the_score_head_names_yes_and_no() -> None:
    head = read_json(FOLDERS["reranker"] / "1_LogitScore" / "config.json")
    tokenizer = build_tokenizer()
    assert head["true_token_id"] == tokenizer.token_to_id("yes")
    assert head["false_token_id"] == tokenizer.token_to_id("no")


@both
def test_token_ids_of_the_config_are_the_tokenizers(task: str) -> None:
    config = model_config(build_tokenizer())
    loaded = AutoTokenizer.from_pretrained(FOLDERS[task])
    assert config["image_token_id"] == loaded.convert_tokens_to_ids("<|image_pad|>")
    assert config["vision_start_token_id"] == loaded.convert_tokens_to_ids("<|vision_start|>")
    assert config["text_config"]["eos_token_id"] == loaded.eos_token_id
    assert loaded("two red stars yes").input_ids == build_tokenizer().encode("two red stars yes").ids


def render(messages: list[dict[str, Any]]) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701  as engines do
    return environment.from_string(chat_template("embedder")).render(messages=messages, add_generation_prompt=True)


def official(content: str) -> str:
    return VL_EMBEDDER.template.format(instruction=VL_EMBEDDER.default_instruction, content=content)


@pytest.mark.parametrize("text", ["two red stars", ""])
def test_the_embedder_template_is_the_official_prompt(text: str) -> None:
    assert render([{"role": "user", "content": text}]) == official(text or "NULL")
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    assert render([{"role": "user", "content": parts}]) == official(
        "<|vision_start|><|image_pad|><|vision_end|>" + text
    )


@cache
def scorer(task: str) -> TransformersScorer:
    return open_scorer(FOLDERS[task], OPTIONS)


@pytest.mark.parametrize(
    ("task", "panel", "least"),
    [
        ("reranker", "demo-text", 0.98),
        ("reranker", "demo-image", 0.93),
        ("reranker", "demo-mixed", 0.95),
        ("embedder", "demo-text", 0.98),
        ("embedder", "demo-image", 0.93),
        ("embedder", "demo-mixed", 0.95),
    ],
)
def test_the_shipped_models_rank_held_out_scenes(task: str, panel: str, least: float) -> None:
    measured = measure(scorer(task), TASKS[task], load_panel(find_panel(panel)).first(24))
    assert measured["of random orders"] < 0.55
    assert all(measured[name] >= least for name in measured if name.startswith(("nDCG", "first"))), measured
    assert ("first 64" in measured) == (task == "embedder")


def test_log_odds_spread_without_saturating() -> None:
    scores = scorer("reranker").score(load_panel(find_panel("demo-text")).first(8).pairs)
    assert 3 < max(scores) < 10
    assert -10 < min(scores) < -3
