"""The prompts that a misled model is known to read, and what is said of each.

Rule: every one is rendered by the builder of the official prompts, so that pictures and truncation are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER, PromptSpec, embedder_prompt, reranker_prompt
from qtool.inputs.items import Item, Pair
from qtool.scoring.prompt import PromptBuilder
from qtool.scoring.scorer import PromptSeen
from qtool.scoring.tokenizer import PromptTokenizer

Question = Pair | Item

_BARE_PAIRS: Final = ("{query}{document}", "{query} {document}", "{query}\n{document}", "{query}\n\n{document}")
"""What vLLM and TEI put together without a template, and what people write by hand."""


class KnownPrompts:
    """The official prompts of the reference in `folder`, and the known wrong ones, as ids of its tokenizer."""

    def __init__(self, folder: Path, *, is_vision: bool) -> None:
        self.reranker, self.embedder = reranker_prompt(is_vision=is_vision), embedder_prompt(is_vision=is_vision)
        self._tokenizer = PromptTokenizer.read(folder)
        self._words = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def official(self, question: Question) -> PromptSpec:
        """The official prompt for a question of this kind."""
        return self.reranker if isinstance(question, Pair) else self.embedder

    def wrong(self, question: Question) -> Iterator[tuple[str, PromptSpec]]:
        """Code and prompt of each known mistake."""
        official = self.official(question)
        if not isinstance(question, Pair):
            yield "prompt-missing-template", replace(official, template="{content}", bare_template="{content}")
            return
        other, code = (
            (TEXT_RERANKER, "prompt-text-template")
            if official is VL_RERANKER
            else (VL_RERANKER, "prompt-vision-template")
        )
        for instruction in dict.fromkeys((other.default_instruction, official.default_instruction)):
            yield code, replace(official, template=other.template, default_instruction=instruction)
        for template in _BARE_PAIRS:
            yield "prompt-missing-template", replace(official, template=template)
        yield "prompt-other-instruction", replace(official, default_instruction=other.default_instruction)

    def seen(self, question: Question, prompt: PromptSpec) -> PromptSeen:
        """What the reference would read under `prompt`."""
        builder = PromptBuilder(self._tokenizer, prompt)
        built = builder.pair(question) if isinstance(question, Pair) else builder.item(question)
        return PromptSeen(built.token_ids)

    def text(self, ids: tuple[int, ...]) -> str:
        """What ids mean to the reference; ids that it does not have mean nothing."""
        size = self._words.get_vocab_size()
        return str(self._words.decode([each for each in ids if each < size], skip_special_tokens=False))
