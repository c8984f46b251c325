"""The language model of a GGUF file: what it is, what makes it rank or embed, and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from gguf.constants import PoolingType, TokenType

from qtool.arch.families import UPSTREAM_RERANKER, reranker_prompts
from qtool.arch.family import Family
from qtool.arch.prompts import ANSWERS, PromptSpec
from qtool.arch.spec import Task
from qtool.artefact import declared_task
from qtool.checks.findings import Finding, finding, printable
from qtool.checks.positions import Positions
from qtool.export.gguf_metadata import DEFAULT_KEY, NAMES_KEY
from qtool.formats.ggml import FLOAT_TYPES
from qtool.storage.gguf_model import RANK_HEAD, RERANK_KEY, GgufModel


@dataclass(frozen=True)
class LanguageModel:
    """A GGUF file of a known family, its task and which field declared it."""

    file: GgufModel
    family: Family
    task: Task | None
    task_source: str

    def integer(self, name: str) -> int | None:
        """A whole number among the architecture's fields, which may be given for each layer."""
        key = self.file.key(name)
        several = set(self.file.integers(key))
        return several.pop() if len(several) == 1 else self.file.integer(key)

    def found(self, code: str, **facts: Any) -> Finding:
        """A finding about this file."""
        return finding(code, self.file.target, task=(self.task or Task.RERANK).value, **facts)

    @property
    def head_dim(self) -> int:
        """Width of one attention head; llama.cpp divides the hidden size where it is not declared."""
        heads = self.integer("attention.head_count") or 1
        return self.integer("attention.key_length") or (self.integer("embedding_length") or 0) // heads

    @property
    def positions(self) -> Positions:
        """Rotary embedding and deepstack as the fields declare them."""
        return Positions(
            family=self.family,
            hidden_size=self.integer("embedding_length") or 0,
            layers=self.integer("block_count") or 0,
            head_dim=self.head_dim,
            rope_theta=self.file.number(self.file.key("rope.freq_base")),
            sections=self.file.integers(self.file.key("rope.dimension_sections")),
            deepstack_layers=self.integer("n_deepstack_layers"),
        )


def language_model(file: GgufModel, family: Family, task: Task | None) -> LanguageModel:
    """What `file` is; `task` overrides what it declares."""
    return LanguageModel(file, family, *((task, "--task") if task is not None else declared_task(file)))


def position_findings(model: LanguageModel) -> Iterator[Finding]:
    """Rotary embedding and deepstack against what the published models have."""
    for problem in model.positions.rope_problems():
        yield model.found("gguf-rope", problem=problem)
    scaling = model.file.text(model.file.key("rope.scaling.type")) or "linear"
    factors = (model.file.number(model.file.key(f"rope.{name}")) for name in ("scaling.factor", "scale_linear"))
    factor = next((each for each in factors if each not in (None, 0)), 1)  # llama.cpp takes 0 for none
    if scaling != "none" and factor != 1:
        yield model.found("gguf-rope-scaling", found=f"{scaling} by {factor:g}")
    if model.file.flag(model.file.key("attention.causal")) is False:
        yield model.found("gguf-not-causal")
    for problem in model.positions.deepstack_problems():
        yield model.found("gguf-deepstack", problem=problem)


# What makes llama.cpp rank or embed with a file: pooling type, rank head, labels and rerank template. Each marker is
# compared with what `convert-gguf` writes for the same family and task.


_POOLING: Final = {Task.RERANK: PoolingType.RANK, Task.EMBED: PoolingType.LAST}
_SIDES: Final = ("query", "document")


def marker_findings(model: LanguageModel) -> Iterator[Finding]:
    """Everything that keeps `model` from doing its task."""
    if model.task is None:
        yield _undeclared(model)
        return
    yield from _pooling_findings(model, model.task)
    if model.task is Task.EMBED:
        yield from _ranker_findings(model)
    if model.task is Task.RERANK:
        yield from _head_findings(model)
        yield from _label_findings(model)
        yield from _template_findings(model)


def _ranker_findings(model: LanguageModel) -> Iterator[Finding]:
    """What an embedder must not have: programs that go by it, qtool among them, take the file for a reranker."""
    held = [RERANK_KEY] if RERANK_KEY in model.file.metadata else []
    held += [RANK_HEAD] if RANK_HEAD in model.file.tensors else []
    if held:
        yield model.found("gguf-ranker-markers", found=" and ".join(held))


def _undeclared(model: LanguageModel) -> Finding:
    """Mentions a name that speaks of a task, for a person to judge: names decide nothing."""
    named = [(source, name, task) for source, name in _names(model) for task in Task if task.value in name.lower()]
    hint = "".join(f"; {source} {printable(name)} suggests {_doer(task)}" for source, name, task in named[:1])
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
    if head.type not in FLOAT_TYPES:
        bits = 8 * head.type.block_bytes / head.type.block
        yield model.found("gguf-head-8-bit" if bits >= 8 else "gguf-head-quantized", type=head.type.name, bits=bits)


def _labels(model: LanguageModel) -> list[str]:
    return list(model.file.texts(model.file.key("classifier.output_labels")))


def _label_findings(model: LanguageModel) -> Iterator[Finding]:
    labels = _labels(model)
    if labels != list(ANSWERS):
        yield model.found("gguf-labels", found=f"[{', '.join(labels)}]" if labels else "missing")


def _template_findings(model: LanguageModel) -> Iterator[Finding]:
    template = model.file.text(RERANK_KEY)
    if template is None:
        yield model.found("gguf-no-rerank-template")
        return
    owner, instruction = _owner(template)
    official = model.family.reranker
    counts = {side: template.count(f"{{{side}}}") for side in _SIDES}
    missing = [side for side, count in counts.items() if not count]
    doubled = [side for side, count in counts.items() if count > 1]
    if missing:
        yield model.found("gguf-incomplete-rerank-template", side=missing[0])
    elif doubled:
        yield model.found("gguf-doubled-placeholder", side=doubled[0], count=counts[doubled[0]])
    elif owner is None:
        yield _unofficial(model, template)
    elif owner != official:
        yield model.found("gguf-wrong-rerank-template", whose=_whose(owner))
    elif instruction != official.default_instruction:
        yield model.found("gguf-own-instruction", instruction=instruction)


def _unofficial(model: LanguageModel, template: str) -> Finding:
    """What a template is that is not an official one byte for byte: llama.cpp sends every byte of it."""
    query, document = (f"{{{side}}}" for side in _SIDES)
    turned = template.replace(query, "\0").replace(document, query).replace("\0", document)
    if _owner(turned)[0] is not None:
        return model.found("gguf-exchanged-placeholders")
    before, _, after = model.family.reranker.template.partition("{instruction}")
    first, last = template.find(before), template.rfind(after) + len(after)
    if 0 <= first < last - len(after):
        added = [text for text in (template[:first], template[last:]) if text]
        return model.found("gguf-padded-rerank-template", found=" and ".join(repr(text) for text in added))
    squeezed = ["".join(text.split()) for text in (template, before, after)]
    if squeezed[0].startswith(squeezed[1]) and squeezed[0].endswith(squeezed[2]):
        return model.found("gguf-respaced-rerank-template")
    return model.found("gguf-unknown-rerank-template")


def _owner(template: str) -> tuple[PromptSpec | None, str]:
    """Whose official prompt `template` is, and the instruction baked into it."""
    for prompt in reranker_prompts():
        instruction = prompt.instruction_in(template)
        if instruction is not None:
            return prompt, instruction
    return None, ""


def _whose(owner: PromptSpec) -> str:
    if owner == UPSTREAM_RERANKER:
        return "the text family's, which llama.cpp's converter gives to every reranker"
    return "the vision family's" if owner.sees_pictures else "another family's"


def _template_name(model: LanguageModel) -> str:
    template = model.file.text(RERANK_KEY)
    if template is None:
        return "missing"
    owner, instruction = _owner(template)
    official = model.family.reranker
    if owner is None:
        return "other"
    if owner != official:
        return "llama.cpp's text template" if owner == UPSTREAM_RERANKER else _whose(owner)
    return "official" if instruction == official.default_instruction else f"official, instruction {instruction!r}"


# The tokenizer inside a GGUF file against the family's. What counts is what llama.cpp will do with the fields: which
# tokens it knows, where it splits, what it adds.

_PREFIX: Final = "tokenizer.ggml."
_MARKUP: Final = re.compile(r"<\|\w+\|>|</?think>")
_PARSED: Final = (TokenType.CONTROL, TokenType.USER_DEFINED)
"""The types that llama.cpp finds in a text before it splits it."""


def tokenizer_findings(model: LanguageModel) -> Iterator[Finding]:
    """Everything that makes llama.cpp see other tokens than the model was trained with."""
    tokens = model.file.texts(f"{_PREFIX}tokens")
    kinds = model.file.integers(f"{_PREFIX}token_type")
    kind, pre = model.file.text(f"{_PREFIX}model"), model.file.text(f"{_PREFIX}pre")
    official = model.family.tokenizer
    if kind != official.gguf_model:
        facts = {"field": f"{_PREFIX}model", "expected": official.gguf_model}
        yield model.found("gguf-tokenizer", found=kind or "missing", **facts)
    merges = model.file.texts(f"{_PREFIX}merges")
    for field, values in (("tokens", tokens), ("token_type", kinds), ("merges", merges)):
        if not values:
            yield model.found("gguf-tokenizer", field=f"{_PREFIX}{field}", found="missing", expected="a list")
    if pre != official.gguf_pre:
        yield model.found("gguf-pre-tokenizer", found=pre or "missing", expected=official.gguf_pre)
    if tokens:
        yield from _word_findings(model, frozenset(tokens))
        yield from _special_findings(model, dict(zip(tokens, kinds, strict=False)))
        yield from _end_findings(model, tokens)
    names = model.file.texts(NAMES_KEY)
    stem = f"{DEFAULT_KEY}."
    stored = sorted(key.removeprefix(stem) for key in model.file.metadata if key.startswith(stem))
    if names and {*names} - {"rerank"} != {*stored} - {"rerank"}:  # a missing rerank template is reported by itself
        yield model.found("gguf-template-names", found=", ".join(names), expected=", ".join(stored) or "none")
    if model.file.flag(f"{_PREFIX}add_bos_token"):
        yield model.found("gguf-start-token")


def tokenizer_markers(model: LanguageModel) -> Iterator[tuple[str, str]]:
    """The tokenizer as a person reads it."""
    kind, pre = (model.file.text(_PREFIX + name) or "missing" for name in ("model", "pre"))
    yield "tokenizer", f"{kind}, {len(model.file.texts(f'{_PREFIX}tokens')):,} tokens"
    yield "pre-tokenizer", pre


def _word_findings(model: LanguageModel, tokens: frozenset[str]) -> Iterator[Finding]:
    if model.task is Task.RERANK:
        for word in ANSWERS:
            if word not in tokens:
                yield model.found("gguf-no-yes-no-token", word=word)


def _special_findings(model: LanguageModel, kinds: dict[str, int]) -> Iterator[Finding]:
    template = model.family.prompt(model.task).template if model.task else ""
    for token in dict.fromkeys(_MARKUP.findall(template)):
        if kinds.get(token) not in _PARSED:
            yield model.found("gguf-prompt-token", token=token)


def _end_findings(model: LanguageModel, tokens: Sequence[str]) -> Iterator[Finding]:
    """Which token stands last, which an embedder pools; to a reranker's prompt llama.cpp adds none."""
    if model.task is not Task.EMBED:
        return
    adds = bool(model.file.flag(f"{_PREFIX}add_eos_token"))
    number = model.file.integer(f"{_PREFIX}eos_token_id")
    last = tokens[number] if number is not None and 0 <= number < len(tokens) else "no token"
    wanted = model.family.embedder.end_token
    if adds and not wanted:
        yield model.found("gguf-end-token", problem=f"llama.cpp appends {last} to every text")
    elif wanted and not adds:
        yield model.found("gguf-end-token", problem=f"llama.cpp does not append {wanted} to every text")
    elif wanted and last != wanted:
        yield model.found("gguf-end-token", problem=f"llama.cpp appends {last} instead of {wanted} to every text")
