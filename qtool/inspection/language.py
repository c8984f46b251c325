"""The language model of a GGUF file: what it is and what it is for.

Rule: the task is what the file's own fields declare, or what the caller says; a name never counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf.constants import PoolingType

from qtool.arch.spec import Task
from qtool.convert.names import RANK_HEAD
from qtool.convert.templates import RERANK_KEY
from qtool.inspection.catalogue import finding
from qtool.inspection.families import Family, Positions
from qtool.inspection.finding import Finding
from qtool.inspection.gguf_model import GgufModel


@dataclass(frozen=True)
class LanguageModel:
    """A GGUF file of a known family, its task and which field declared it."""

    file: GgufModel
    family: Family
    task: Task | None
    task_source: str

    def key(self, name: str) -> str:
        """The full key of one of the architecture's fields."""
        return f"{self.family.gguf_architecture}.{name}"

    def integer(self, name: str) -> int | None:
        """A whole number among the architecture's fields."""
        return self.file.integer(self.key(name))

    def found(self, code: str, **facts: Any) -> Finding:
        """A finding about this file."""
        return finding(code, self.file.target, task=(self.task or Task.RERANK).value, maker="convert-gguf", **facts)

    @property
    def head_dim(self) -> int:
        """Width of one attention head; llama.cpp divides the hidden size where it is not declared."""
        heads = self.integer("attention.head_count") or 1
        return self.integer("attention.key_length") or (self.integer("embedding_length") or 0) // heads

    @property
    def positions(self) -> Positions:
        """Rotary embedding and deepstack as the fields declare them."""
        return Positions(
            self.family,
            self.integer("embedding_length") or 0,
            self.integer("block_count") or 0,
            self.head_dim,
            self.file.number(self.key("rope.freq_base")),
            self.file.integers(self.key("rope.dimension_sections")),
            self.integer("n_deepstack_layers"),
        )


def language_model(file: GgufModel, family: Family, task: Task | None) -> LanguageModel:
    """What `file` is; `task` overrides what it declares."""
    if task is not None:
        return LanguageModel(file, family, task, "--task")
    declared, source = next(_declared_tasks(file, family), (None, "nothing declares it"))
    return LanguageModel(file, family, declared, source)


def _declared_tasks(file: GgufModel, family: Family) -> Iterator[tuple[Task, str]]:
    """Every sign of a task, the surest first: only a reranker has a head, embedders have nothing but a pooling type."""
    labels, pooling = (f"{family.gguf_architecture}.{name}" for name in ("classifier.output_labels", "pooling_type"))
    for sign, holder in ((RANK_HEAD, file.tensors), (RERANK_KEY, file.metadata), (labels, file.metadata)):
        if sign in holder:
            yield Task.RERANK, sign
    declared = file.integer(pooling)
    if declared == PoolingType.RANK:
        yield Task.RERANK, f"{pooling} = {declared} (RANK)"
    elif declared in (PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST):
        yield Task.EMBED, f"{pooling} = {declared} ({PoolingType(declared).name})"


def position_findings(model: LanguageModel) -> Iterator[Finding]:
    """Rotary embedding and deepstack against what the published models have."""
    for problem in model.positions.rope_problems():
        yield model.found("gguf-rope", problem=problem)
    scaling = model.file.text(model.key("rope.scaling.type"))
    if scaling not in (None, "none"):
        yield model.found("gguf-rope-scaling", found=scaling)
    for problem in model.positions.deepstack_problems():
        yield model.found("gguf-deepstack", problem=problem)
