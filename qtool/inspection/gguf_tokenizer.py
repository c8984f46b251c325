"""The tokenizer inside a GGUF file against the family's.

Rule: what counts is what llama.cpp will do with the fields: which tokens it knows, where it splits, what it adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from gguf.constants import TokenType

from qtool.arch.prompts import NO, TEXT_EMBEDDER, YES, PromptSpec, embedder_prompt, reranker_prompt
from qtool.arch.spec import Task
from qtool.inspection.finding import Finding
from qtool.inspection.language import LanguageModel

_PREFIX: Final = "tokenizer.ggml."
_MODEL: Final = "gpt2"
_PRE: Final = "qwen2"
_MARKUP: Final = re.compile(r"<\|\w+\|>|</?think>")
_PARSED: Final = (TokenType.CONTROL, TokenType.USER_DEFINED)
"""The types that llama.cpp finds in a text before it splits it."""


def tokenizer_findings(model: LanguageModel) -> Iterator[Finding]:
    """Everything that makes llama.cpp see other tokens than the model was trained with."""
    tokens = model.file.texts(f"{_PREFIX}tokens")
    kinds = model.file.integers(f"{_PREFIX}token_type")
    kind, pre = model.file.text(f"{_PREFIX}model"), model.file.text(f"{_PREFIX}pre")
    if kind != _MODEL:
        yield model.found("gguf-tokenizer", field=f"{_PREFIX}model", found=kind or "missing", expected=_MODEL)
    for field, length in (("tokens", len(tokens)), ("token_type", len(kinds)), ("merges", _merges(model))):
        if not length:
            yield model.found("gguf-tokenizer", field=f"{_PREFIX}{field}", found="missing", expected="a list")
    if pre != _PRE:
        yield model.found("gguf-pre-tokenizer", found=pre or "missing")
    if tokens:
        yield from _word_findings(model, frozenset(tokens))
        yield from _special_findings(model, dict(zip(tokens, kinds, strict=False)))
        yield from _end_findings(model, tokens)
    if model.file.flag(f"{_PREFIX}add_bos_token"):
        yield model.found("gguf-start-token")


def tokenizer_markers(model: LanguageModel) -> Iterator[tuple[str, str]]:
    """The tokenizer as a person reads it."""
    kind, pre = (model.file.text(_PREFIX + name) or "missing" for name in ("model", "pre"))
    yield "tokenizer", f"{kind}, {len(model.file.texts(f'{_PREFIX}tokens')):,} tokens"
    yield "pre-tokenizer", pre


def _merges(model: LanguageModel) -> int:
    return len(model.file.texts(f"{_PREFIX}merges"))


def _word_findings(model: LanguageModel, tokens: frozenset[str]) -> Iterator[Finding]:
    if model.task is Task.RERANK:
        for word in (YES, NO):
            if word not in tokens:
                yield model.found("gguf-no-yes-no-token", word=word)


def _special_findings(model: LanguageModel, kinds: dict[str, int]) -> Iterator[Finding]:
    wanted = dict.fromkeys(_MARKUP.findall(_prompt(model).template)) if model.task else {}
    for token in wanted:
        if kinds.get(token) not in _PARSED:
            yield model.found("gguf-prompt-token", token=token)


def _prompt(model: LanguageModel) -> PromptSpec:
    choose = reranker_prompt if model.task is Task.RERANK else embedder_prompt
    return choose(is_vision=model.family.is_vision)


def _end_findings(model: LanguageModel, tokens: Sequence[str]) -> Iterator[Finding]:
    """Which token stands last, which an embedder pools; to a reranker's prompt llama.cpp adds none."""
    if model.task is not Task.EMBED:
        return
    adds = bool(model.file.flag(f"{_PREFIX}add_eos_token"))
    number = model.file.integer(f"{_PREFIX}eos_token_id")
    last = tokens[number] if number is not None and 0 <= number < len(tokens) else "no token"
    wanted = TEXT_EMBEDDER.end_token
    if model.family.is_vision and adds:
        yield model.found("gguf-end-token", problem=f"{last} is put behind every text")
    elif not model.family.is_vision and not adds:
        yield model.found("gguf-end-token", problem=f"{wanted} is not put behind every text")
    elif not model.family.is_vision and last != wanted:
        yield model.found("gguf-end-token", problem=f"{last} is put behind every text instead of {wanted}")
