"""Models of every form that `convert-gguf` takes: the demo models, and random ones with the demo tokenizer."""

from __future__ import annotations

import json
import shutil

from qtool import resources
from tests.tiny import TEXT, text_config, vl_config, write_checkpoint

SIZES = {**TEXT, "vocab_size": 1024}
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "modules.json",
          "preprocessor_config.json", "1_LogitScore", "1_Pooling")  # fmt: skip


def random_model(config, *, like, dtype="BF16", appended=None):
    """A maker of a random checkpoint with the side files of the demo model `like`."""

    def make(folder):
        write_checkpoint(folder, config, dtype=dtype)
        for name in _FILES:
            source = resources.demo_model(like) / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            elif source.is_file():
                shutil.copyfile(source, folder / name)
        if appended:
            _append(folder, appended)
        return folder

    return make


def _append(folder, token):
    """Let the tokenizer end every text with a token, as Qwen3-Embedding's does."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    number = next(each["id"] for each in tokenizer["added_tokens"] if each["content"] == token)
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [tokenizer["post_processor"], template]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def _demo(name):
    return lambda folder: shutil.copytree(resources.demo_model(name), folder)


RERANKER, EMBEDDER = "qtool-demo-reranker", "qtool-demo-embedder"
MODELS = {
    "demo-reranker": _demo(RERANKER),
    "demo-embedder": _demo(EMBEDDER),
    "text-reranker-untied": random_model(text_config(SIZES), like=RERANKER),
    "text-reranker-bias-f16": random_model(
        text_config(SIZES, tied=True, attention_bias=True), like=RERANKER, dtype="F16"
    ),
    "text-embedder-appends": random_model(text_config(SIZES), like=EMBEDDER, dtype="F32", appended="<|endoftext|>"),
    "vl-reranker-untied": random_model(vl_config(SIZES, tied=False), like=RERANKER),
}
"""Makers by name; each takes a folder that does not exist yet and returns it."""
RERANKERS = [name for name in MODELS if "reranker" in name]
WITH_PICTURES = [name for name in MODELS if "text" not in name]
