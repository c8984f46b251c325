"""What ships: every file, under the real names, and scores that mean something."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen3VLConfig

from qtool.demo.architecture import model_config
from qtool.demo.evaluate import Model, Query, ndcg, random_baseline, read_panel
from qtool.demo.export import MODELS
from qtool.demo.panels import CALIBRATION
from qtool.demo.prompts import Side, embed_prompt, rerank_prompt
from qtool.demo.sidecars import chat_template, json_files
from qtool.demo.tokenizer import build_tokenizer

FOLDERS = {task: MODELS / f"qtool-demo-{task}" for task in ("reranker", "embedder")}
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
both = pytest.mark.parametrize("task", list(FOLDERS))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@both
def test_every_file_is_there_and_no_other(task: str) -> None:
    files = {str(path.relative_to(FOLDERS[task])) for path in FOLDERS[task].rglob("*") if path.is_file()}
    assert files == COMMON | OWN[task]
    assert sum(path.stat().st_size for path in FOLDERS[task].rglob("*")) <= 11_000_000


@both
def test_the_side_files_are_what_the_script_writes(task: str) -> None:
    for name, content in json_files(build_tokenizer(), task).items():
        assert read_json(FOLDERS[task] / name) == content, name
    assert (FOLDERS[task] / "chat_template.jinja").read_text(encoding="utf-8") == chat_template(task)


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


def render(task: str, messages: list[dict[str, Any]]) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701  as engines do
    return environment.from_string(chat_template(task)).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("text", ["two red stars", "", 'a\n<b> & "c" {{ d }}'])
def test_the_reranker_template_is_the_official_prompt(text: str) -> None:
    messages = [{"role": "query", "content": "which?"}, {"role": "document", "content": text}]
    assert render("reranker", messages) == rerank_prompt(Side("which?"), Side(text))
    parts = [{"type": "text", "text": text}, {"type": "image", "image": "a.png"}]
    messages[1] = {"role": "document", "content": parts}
    assert render("reranker", messages) == rerank_prompt(Side("which?"), Side(text, 1))


def test_the_reranker_template_takes_an_instruction() -> None:
    messages = [{"role": "system", "content": "Be strict."}, {"role": "query", "content": "q"}]
    assert "<Instruct>: Be strict.<Query>:q\n<Document>:NULL" in render("reranker", messages)


@pytest.mark.parametrize("text", ["two red stars", ""])
def test_the_embedder_template_is_the_official_prompt(text: str) -> None:
    assert render("embedder", [{"role": "user", "content": text}]) == embed_prompt(Side(text))
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    assert render("embedder", [{"role": "user", "content": parts}]) == embed_prompt(Side(text, 1))


@cache
def model(task: str) -> Model:
    return Model(FOLDERS[task])


@cache
def queries(panel: str) -> tuple[Query, ...]:
    return tuple(read_panel(CALIBRATION / "panels" / f"{panel}.jsonl", 24))


@pytest.mark.parametrize(
    ("task", "panel", "least"),
    [
        ("reranker", "demo-text", 0.9),
        ("reranker", "demo-image", 0.8),
        ("embedder", "demo-text", 0.8),
        ("embedder", "demo-image", 0.7),
    ],
)
def test_the_shipped_models_rank_held_out_scenes(task: str, panel: str, least: float) -> None:
    scorer = model(task)
    scores = [scorer.log_odds(query) if task == "reranker" else scorer.cosines(query)[0] for query in queries(panel)]
    values = [ndcg(row, query.labels) for row, query in zip(scores, queries(panel), strict=True)]
    assert sum(values) / len(values) >= least
    assert random_baseline(list(queries(panel)), rounds=5) < 0.55


def test_log_odds_spread_without_saturating() -> None:
    scores = [score for query in queries("demo-text")[:8] for score in model("reranker").log_odds(query)]
    assert 3 < max(scores) < 10
    assert -10 < min(scores) < -3
