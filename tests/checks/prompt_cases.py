"""Runtimes that read another prompt than the reference: what a server does whose template or tokenizer is not the model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER
from tests.checks.registry import PROMPT, case

SERVED = "a runtime"


@dataclass(frozen=True)
class Rereading:
    """A scorer whose runtime changes the official ids."""

    scorer: Any
    change: Any

    def prompt_seen(self, question):
        """The changed ids."""
        seen = self.scorer.prompt_seen(question)
        return replace(seen, token_ids=tuple(self.change(seen.token_ids)))


@dataclass(frozen=True)
class Silent:
    """A scorer whose runtime does not tell what it reads, as a server's."""

    scorer: Any

    @property
    def identity(self):
        """The scorer's."""
        return self.scorer.identity

    def prompt_seen(self, _question):
        """Nothing."""

    def score(self, pairs):
        """The scorer's scores."""
        return self.scorer.score(pairs)


def under(scorer, **changes):
    """The same model under a changed prompt."""
    return scorer.under(replace(VL_RERANKER, **changes))


@case(PROMPT, "prompt-text-template", SERVED)
def text_template(scorer):
    """The runtime renders the text reranker's prompt"""
    return under(scorer, template=TEXT_RERANKER.template, default_instruction=TEXT_RERANKER.default_instruction)


@case(PROMPT, "prompt-text-template", SERVED)
def text_template_of_a_silent_server(scorer):
    """The runtime renders the text reranker's prompt and does not tell: only the scores do"""
    return Silent(text_template(scorer))


@case(PROMPT, "prompt-missing-template", SERVED)
def chat_template_missing(scorer):
    """vLLM without --chat-template puts query and document together bare"""
    return under(scorer, template="{query}{document}")


@case(PROMPT, "prompt-missing-template", SERVED)
def chat_template_missing_on_a_silent_server(scorer):
    """vLLM without --chat-template, which does not tell: only the scores do"""
    return Silent(chat_template_missing(scorer))


@case(PROMPT, "prompt-other-instruction", SERVED)
def instruction_changed(scorer):
    """The runtime has another default instruction"""
    return under(scorer, default_instruction="Find pictures of birds.")


@case(PROMPT, "prompt-other-instruction", SERVED)
def instruction_of_the_text_family_on_a_silent_server(scorer):
    """The runtime has the text family's default instruction and does not tell"""
    return Silent(under(scorer, default_instruction=TEXT_RERANKER.default_instruction))


@case(PROMPT, "prompt-start-token", SERVED)
def start_token_added(scorer):
    """The runtime puts a start token before the prompt"""
    return Rereading(scorer, lambda ids: (token(scorer, "<|endoftext|>"), *ids))


@case(PROMPT, "prompt-end-token", SERVED)
def end_token_added(scorer):
    """The runtime puts an end token behind the prompt"""
    return Rereading(scorer, lambda ids: (*ids, token(scorer, "<|im_end|>")))


@case(PROMPT, "prompt-lost-end", SERVED)
def end_lost(scorer):
    """The runtime leaves the last newline out"""
    return Rereading(scorer, lambda ids: ids[:-1])


@case(PROMPT, "prompt-truncated", SERVED)
def cut_to_a_short_context(scorer):
    """The runtime cuts prompts from the middle to fit its context"""
    return Rereading(scorer, lambda ids: (*ids[:40], *ids[-5:]))


@case(PROMPT, "prompt-other-tokenizer", SERVED)
def tokenizer_of_another_model(scorer):
    """The runtime has another model's tokenizer"""
    return Rereading(scorer, lambda ids: tuple((each * 7 + 3) % 300 for each in ids))


@case(PROMPT, "prompt-other-tokens", SERVED)
def merges_forgotten(scorer):
    """The runtime cuts the same text into other tokens"""
    return Rereading(scorer, lambda ids: _letters(scorer, ids))


@case(PROMPT, "prompt-differs", SERVED)
def word_lost(scorer):
    """The runtime swallows a token of the document"""
    return Rereading(scorer, lambda ids: (*ids[:-12], 300, *ids[-11:]))


def token(scorer, text):
    """The id of a special token."""
    return scorer._opened.tokenizer.token_id(text)


def _letters(scorer, ids):
    """The ids with the first word of two bytes or more spelt byte by byte."""
    tokenizer = scorer._opened.tokenizer._tokenizer
    for place, each in enumerate(ids):
        letters = [tokenizer.token_to_id(letter) for letter in tokenizer.id_to_token(each)]
        if len(letters) > 1 and None not in letters:
            return (*ids[:place], *letters, *ids[place + 1 :])
    return ids
