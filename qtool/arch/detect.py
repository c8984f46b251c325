"""Reads from config.json and the sentence-transformers side files which architecture a checkpoint is, and for which task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool.arch.families import FAMILIES, architectures
from qtool.arch.family import Family
from qtool.arch.spec import Architecture, Config, Task, section
from qtool.errors import ModelError, UsageError
from qtool.jsonfile import read_json

_TASK_OF_MODULE: Final = {"LogitScore": Task.RERANK, "Pooling": Task.EMBED}
_TASK_OF_MODEL_TYPE: Final = {"CrossEncoder": Task.RERANK, "SentenceTransformer": Task.EMBED}


@dataclass(frozen=True)
class Detection:
    """What a checkpoint is, and which field said so."""

    architecture: Architecture
    config: Mapping[str, Any]
    task: Task | None
    task_source: str

    @property
    def family(self) -> Family:
        """What is known of the architecture's family."""
        return FAMILIES[self.architecture.family]

    @property
    def text(self) -> Config:
        """The part of the config that describes the decoder."""
        return section(self.config, "text_config") if self.architecture.is_vision else self.config

    @property
    def vision(self) -> Config:
        """The part of the config that describes the vision tower; empty of a text model."""
        return section(self.config, "vision_config") if self.architecture.is_vision else {}

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
    known = architectures()
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError("config.json has no `architectures`.", f"Add the model's class name: {', '.join(known)}.")
    architecture = known.get(str(names[0]))
    if architecture is None:
        raise ModelError(f"Unknown architecture {names[0]!r} in config.json.", f"Known are {', '.join(known)}.")
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
    fields = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "depth", "num_position_embeddings", "out_hidden_size", "num_labels",
    )  # fmt: skip
    sizes = dict.fromkeys(fields, 1)
    config = {**sizes, "text_config": sizes, "vision_config": {**sizes, "deepstack_visual_indexes": [0]}}
    return frozenset(spec.module for known in architectures().values() for spec in known.tensors(config))
