"""The files beside a checkpoint's weights, and what breaks without each.

Rule: presence is judged by name, contents only where they decide how the model pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.arch.prompts import reranker_prompt
from qtool.arch.rerank_template import rerank_template
from qtool.arch.spec import Task
from qtool.inspection.checkpoint_model import TOKENIZER, CheckpointModel, as_mapping
from qtool.inspection.finding import Finding
from qtool.jsonfile import read_json

_CHAT_TEMPLATE: Final = "chat_template.jinja"
_MODULES: Final = "modules.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_SENTENCE_TRANSFORMERS: Final = {
    "config_sentence_transformers.json": "the task and its prompts",
    "sentence_bert_config.json": "how to take pictures",
}


def side_file_findings(model: CheckpointModel) -> Iterator[Finding]:
    """Every file that is missing and missed."""
    if TOKENIZER not in model.names and not {"vocab.json", "merges.txt"} <= set(model.names):
        yield model.found("safetensors-missing-tokenizer", name=TOKENIZER)
    if _TOKENIZER_CONFIG not in model.names:
        yield model.found("safetensors-missing-tokenizer-config", name=_TOKENIZER_CONFIG)
    if _needs_chat_template(model) and not _has_chat_template(model):
        yield model.found("safetensors-missing-chat-template", name=_CHAT_TEMPLATE)
    if model.family.is_vision and not {"preprocessor_config.json", "processor_config.json"} & set(model.names):
        yield model.found("safetensors-missing-preprocessor", name="preprocessor_config.json")
    if _MODULES in model.names:
        yield from _module_findings(model)
    else:
        yield model.found("safetensors-missing-modules-json", name=_MODULES)


def chat_template(model: CheckpointModel) -> str:
    """Whose the chat template is, for people: vLLM renders a reranker's prompt with it."""
    official = rerank_template(reranker_prompt(is_vision=model.family.is_vision))
    path = model.checkpoint.directory / _CHAT_TEMPLATE
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace").strip() == official.strip():
        return "official"
    return "present" if _has_chat_template(model) else "missing"


def _has_chat_template(model: CheckpointModel) -> bool:
    if any(name.startswith(("chat_template.", "additional_chat_templates/")) for name in model.names):
        return True
    return "chat_template" in _read(model, _TOKENIZER_CONFIG)


def _needs_chat_template(model: CheckpointModel) -> bool:
    """Only the text embedder's prompt is plain text."""
    return model.family.is_vision or model.detection.task is not Task.EMBED


def _read(model: CheckpointModel, name: str) -> Mapping[str, Any]:
    return read_json(model.checkpoint.directory / name) if name in model.names else {}


def _module_findings(model: CheckpointModel) -> Iterator[Finding]:
    for name, purpose in _SENTENCE_TRANSFORMERS.items():
        is_needed = name != "sentence_bert_config.json" or model.family.is_vision
        if is_needed and name not in model.names:
            yield model.found("safetensors-missing-sentence-transformers-config", name=name, purpose=purpose)
    for module in map(as_mapping, read_json(model.checkpoint.directory / _MODULES, list)):
        kind, path = (str(module.get(key, "")) for key in ("type", "path"))
        config = f"{path}/config.json"
        if not path or kind.endswith("Normalize"):  # which has nothing to configure
            continue
        if config not in model.names:
            yield model.found("safetensors-missing-module", path=path, name=f"'{path}/*'")
        elif kind.endswith("Pooling"):
            yield from _pooling_findings(model, _read(model, config))


def _pooling_findings(model: CheckpointModel, pooling: Mapping[str, Any]) -> Iterator[Finding]:
    flags = [
        key.removeprefix("pooling_mode_") for key, flag in pooling.items() if key.startswith("pooling_mode_") and flag
    ]
    found = str(pooling.get("pooling_mode") or ", ".join(flags))
    if found != "lasttoken":
        yield model.found("safetensors-pooling", found=found or "nothing", name="1_Pooling/config.json")
