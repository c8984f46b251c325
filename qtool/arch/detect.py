"""Reads from a checkpoint's declared fields which architecture it is and what task it is for.

Rule: only config.json and the sentence-transformers side files speak; a README or a folder's name never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool.arch import qwen3, qwen3_vl
from qtool.arch.spec import Architecture, Task
from qtool.errors import ModelError, UsageError
from qtool.jsonfile import read_json

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    architecture.name: architecture
    for architecture in (
        qwen3.CAUSAL_LM,
        qwen3.SEQUENCE_CLASSIFICATION,
        qwen3_vl.CONDITIONAL_GENERATION,
        qwen3_vl.SEQUENCE_CLASSIFICATION,
    )
}

_TASK_OF_MODULE: Final = {"LogitScore": Task.RERANK, "Pooling": Task.EMBED}
_TASK_OF_MODEL_TYPE: Final = {"CrossEncoder": Task.RERANK, "SentenceTransformer": Task.EMBED}


@dataclass(frozen=True)
class Detection:
    """What a checkpoint is, and which field said so."""

    architecture: Architecture
    config: Mapping[str, Any]
    task: Task | None
    task_source: str

    def require_task(self) -> Task:
        """The task, or an error that asks for it."""
        if self.task is None:
            raise UsageError(
                "The checkpoint does not say whether it is a reranker or an embedder.",
                "Pass --task rerank or --task embed.",
            )
        return self.task


def detect(directory: Path, task: Task | None = None) -> Detection:
    """Read config.json and the side files of `directory`; `task` overrides what they say."""
    config = read_json(directory / "config.json")
    architecture = architecture_of(config)
    if task is not None:
        return Detection(architecture, config, task, "--task")
    return Detection(architecture, config, *_declared_task(directory, architecture))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that `architectures` names, or a ModelError listing the known ones."""
    known = ", ".join(ARCHITECTURES)
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError("config.json has no `architectures`.", f"Add the model's class name; known are {known}.")
    architecture = ARCHITECTURES.get(str(names[0]))
    if architecture is None:
        raise ModelError(f"Unknown architecture {names[0]!r} in config.json.", f"Known are {known}.")
    return architecture


def _declared_task(directory: Path, architecture: Architecture) -> tuple[Task | None, str]:
    if (directory / "modules.json").is_file():
        for module in read_json(directory / "modules.json", list):
            name = str(module.get("type", "") if isinstance(module, dict) else "").rpartition(".")[2]
            if name in _TASK_OF_MODULE:
                return _TASK_OF_MODULE[name], f"modules.json ({name})"
    if (directory / "config_sentence_transformers.json").is_file():
        declared = read_json(directory / "config_sentence_transformers.json").get("model_type")
        if declared in _TASK_OF_MODEL_TYPE:
            return _TASK_OF_MODEL_TYPE[declared], f"config_sentence_transformers.json ({declared})"
    if architecture.head == "score":
        return Task.RERANK, f"config.json ({architecture.name})"
    return None, "nothing declares it"


def known_modules() -> frozenset[str]:
    """Every module name that some known architecture has, for one layer each: what a recipe's patterns may mean."""
    text = dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "depth", "num_position_embeddings", "out_hidden_size", "num_labels"), 1,
    )  # fmt: skip
    config = {**text, "text_config": text, "vision_config": {**text, "deepstack_visual_indexes": [0]}}
    return frozenset(spec.module for known in ARCHITECTURES.values() for spec in known.tensors(config))
