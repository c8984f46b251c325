"""What makes llama.cpp rank or embed with a file: pooling type, rank head, labels and rerank template.

Rule: each marker is compared with what the convert room writes for the same family and task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from gguf.constants import PoolingType

from qtool.arch.prompts import NO, TEXT_RERANKER, VL_RERANKER, YES, PromptSpec, reranker_prompt
from qtool.arch.spec import Task
from qtool.convert.names import RANK_HEAD
from qtool.convert.templates import RERANK_KEY, baked_instruction
from qtool.formats.ggml import BF16, F16, F32
from qtool.inspection.catalogue import finding
from qtool.inspection.finding import Finding, printable
from qtool.inspection.language import LanguageModel

_POOLING: Final = {Task.RERANK: PoolingType.RANK, Task.EMBED: PoolingType.LAST}
_SIDES: Final = ("query", "document")


def marker_findings(model: LanguageModel) -> Iterator[Finding]:
    """Everything that keeps `model` from doing its task."""
    if model.task is None:
        yield _undeclared(model)
        return
    yield from _pooling_findings(model, model.task)
    if model.task is Task.RERANK:
        yield from _head_findings(model)
        yield from _label_findings(model)
        yield from _template_findings(model)


def _undeclared(model: LanguageModel) -> Finding:
    """A name that speaks of a task is told to who can judge it, and decides nothing."""
    named = [(source, name, task) for source, name in _names(model) for task in Task if task.value in name.lower()]
    hint = "".join(
        f"; {source} {printable(name)} hints at {_doer(task)}, and decides nothing" for source, name, task in named[:1]
    )
    task = named[0][2] if named else Task.RERANK
    return finding("gguf-task-undeclared", model.file.target, task=task.value, hint=hint)


def _names(model: LanguageModel) -> Iterator[tuple[str, str]]:
    for key in ("general.name", "general.basename", "general.finetune"):
        yield key, model.file.text(key) or ""
    yield "the file's name", PurePosixPath(model.file.name).name


def markers(model: LanguageModel) -> Iterator[tuple[str, str]]:
    """The markers as a person reads them."""
    yield "pooling", _pooling_name(model.integer("pooling_type"))
    head = model.file.tensors.get(RANK_HEAD)
    if model.task is Task.RERANK or head is not None:
        yield "rank head", f"{list(head.shape)} {head.type.name}" if head else "missing"
        yield "labels", ", ".join(_labels(model)) or "missing"
        yield "rerank template", _template_name(model)


def _pooling_findings(model: LanguageModel, task: Task) -> Iterator[Finding]:
    found, expected = model.integer("pooling_type"), _POOLING[task]
    if found in (None, PoolingType.NONE):
        yield model.found("gguf-no-pooling", expected=expected.name)
    elif found != expected:
        yield model.found("gguf-wrong-pooling", found=_pooling_name(found), expected=expected.name, doer=_doer(task))


def _doer(task: Task) -> str:
    return "a reranker" if task is Task.RERANK else "an embedder"


def _pooling_name(number: int | None) -> str:
    if number is None:
        return "missing"
    return PoolingType(number).name if number in PoolingType.__members__.values() else str(number)


def _head_findings(model: LanguageModel) -> Iterator[Finding]:
    head = model.file.tensors.get(RANK_HEAD)
    if head is None:
        yield model.found("gguf-no-rank-head")
        return
    expected = (2, model.integer("embedding_length"))
    if head.shape != expected:
        yield model.found("gguf-head-shape", found=list(head.shape), expected=list(expected))
    if head.type not in (F32, F16, BF16):
        bits = 8 * head.type.block_bytes / head.type.block
        yield model.found("gguf-head-8-bit" if bits >= 8 else "gguf-head-quantized", type=head.type.name, bits=bits)


def _labels(model: LanguageModel) -> list[str]:
    return list(model.file.texts(model.key("classifier.output_labels")))


def _label_findings(model: LanguageModel) -> Iterator[Finding]:
    labels = _labels(model)
    if labels != [YES, NO]:
        yield model.found("gguf-labels", found=f"[{', '.join(labels)}]" if labels else "missing")


def _template_findings(model: LanguageModel) -> Iterator[Finding]:
    template = model.file.text(RERANK_KEY)
    if template is None:
        yield model.found("gguf-no-rerank-template")
        return
    owner, instruction = _owner(template)
    official = reranker_prompt(is_vision=model.family.is_vision)
    missing = [side for side in _SIDES if f"{{{side}}}" not in template]
    if missing:
        yield model.found("gguf-incomplete-rerank-template", side=missing[0])
    elif owner is None:
        yield model.found("gguf-unknown-rerank-template")
    elif owner is not official:
        yield model.found("gguf-wrong-rerank-template", whose=_whose(owner))
    elif instruction != official.default_instruction:
        yield model.found("gguf-own-instruction", instruction=instruction)


def _owner(template: str) -> tuple[PromptSpec | None, str]:
    """Whose official prompt `template` is, and the instruction baked into it."""
    for prompt in (VL_RERANKER, TEXT_RERANKER):
        instruction = baked_instruction(template, prompt)
        if instruction is not None:
            return prompt, instruction
    return None, ""


def _whose(owner: PromptSpec) -> str:
    if owner is TEXT_RERANKER:
        return "the text family's, which llama.cpp's converter gives to every reranker"
    return "the vision family's"


def _template_name(model: LanguageModel) -> str:
    template = model.file.text(RERANK_KEY)
    if template is None:
        return "missing"
    owner, instruction = _owner(template)
    official = reranker_prompt(is_vision=model.family.is_vision)
    if owner is None:
        return "other"
    if owner is not official:
        return "upstream's text template" if owner is TEXT_RERANKER else "the vision family's"
    return "official" if instruction == official.default_instruction else f"official, instruction {instruction!r}"
