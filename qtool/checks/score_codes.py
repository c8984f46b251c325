"""The codes of the stage scores: faults of a runtime that only its answers show. Part of the catalogue in findings.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Entry = tuple[str, str, str]
"""Severity, sentence and remedy."""


def broken(sentence: str, remedy: str = "") -> Entry:
    """An entry of a fault."""
    return "broken", sentence, remedy


def warning(sentence: str, remedy: str = "") -> Entry:
    """An entry of what may be meant so."""
    return "warning", sentence, remedy


_SERVE: Final = "qtool serve-command MODEL --engine vllm"

# `scores-` codes are proved by the scores of both models alone, `served-` codes by asking a server again or otherwise.
SCORE_CODES: Final[Mapping[str, Entry]] = {
    "scores-constant": broken(
        "Every question of {panel} gets the same answer ({found}): the runtime does not read query and document.",
        _SERVE,
    ),
    "scores-no-document": broken(
        "The documents of a query all get the same score on {panel}: the runtime does not read the document.", _SERVE
    ),
    "scores-no-query": broken(
        "A document gets the same score under every query of {panel}: the runtime does not read the query.", _SERVE
    ),
    "scores-exchanged": broken(
        "{count} of {total} vectors of {panel} are those of other items. Return vectors in the order of the inputs.",
    ),
    "scores-reversed": broken(
        "The scores are those of no, not of yes (log-odds times -1, within {error}): every ranking is reversed.", _SERVE
    ),
    "scores-activated-twice": broken(
        "An activation is applied twice ({activation}): probabilities are between {low} and {high}, and applying it to the "
        "reference's probabilities gives them within {error}. Return the first probability as it is.",
    ),
    "scores-scaled": broken(
        "The log-odds are {factor} times the reference's (within {error}): a temperature or another activation is applied.",
        _SERVE,
    ),
    "scores-rescaled": broken(
        "The probabilities are {factor} times the reference's plus {offset}. Return the probability of yes as it is.",
    ),
    "scores-clipped": broken(
        "The {count} {which} scores are all {value} where the reference has different ones: they are clipped. Return them as they are.",
    ),
    "scores-rounded": broken(
        "The {what} are rounded to {digits} decimals: unequal documents get equal scores. Send every digit.",
    ),
    "served-log-odds": broken(
        "The server returns log-odds ({low} to {high}, the reference's within {error}) where its interface promises "
        "probabilities: the sigmoid is missing.",
        _SERVE,
    ),
    "served-log-probabilities": broken(
        "The server returns logarithms of probabilities ({low} to {high}, the reference's within {error}) where its "
        "interface promises probabilities.",
        _SERVE,
    ),
    "served-rescaled": broken(
        "The server returns {factor} times the probability plus {offset} ({low} to {high}) where its interface promises "
        "the probability.",
    ),
    "served-activated": broken(
        "The server returns probabilities where log-odds were asked for: the sigmoid of the reference's log-odds gives "
        "them within {error}.",
        _SERVE,
    ),
    "served-one-token": broken(
        "The server reads {found} of a prompt of {expected} tokens, so all pairs get the same score: it does not build the "
        "prompt.",
        _SERVE,
    ),
    "served-warm-prefix": broken(
        "{question}: the score is {expected} without the server's prefix cache and {found} with it, and so for {count} of "
        "{total} pairs. Start vLLM with --no-enable-prefix-caching, SGLang with --disable-radix-cache."
    ),
    "served-changes": broken(
        "{question}: the score was {expected} when first asked and is {found} since, and so for {count} of {total} pairs: a "
        "cache of prompts changes answers. Start vLLM with --no-enable-prefix-caching, SGLang with --disable-radix-cache."
    ),
    "served-unsteady": broken(
        "{question}: the same request gave {expected} and then {found}, and so for {count} of {total} pairs: answers depend "
        "on what the server does besides. Ask again with --concurrency 1 and without other users.",
    ),
    "served-relative": broken(
        "The scores of one request {how}, and a document alone gets {alone}: they are relative to the other documents, "
        "not probabilities of yes.",
        _SERVE,
    ),
    "served-exchanged": broken(
        "{question}: asked alone the score is {expected}, among {documents} documents {found}, which is another document's: "
        "the indices of the results do not name the documents as they were sent. Number results by the request's order.",
    ),
    "served-batch": broken(
        "{question}: asked alone the score is {expected}, among {documents} documents {found}, and so for {count} of {total} "
        "pairs: the padding or batching of the server changes scores. Serve one sequence at a time to confirm it (vLLM: --max-num-seqs 1)."
    ),
    "served-truncated": broken(
        "Documents are cut {where} about {words} words, without an error: the words beyond do not change the {what}.",
        _SERVE,
    ),
    "served-concurrent": broken(
        "{question}: the score is {expected} when one request is made at a time and {found} beside others, and so for "
        "{count} of {total} pairs: requests disturb one another. Serve one sequence at a time to confirm it (vLLM: "
        "--max-num-seqs 1)."
    ),
    "served-other-text": broken(
        "The scores are those of {found}: their distance from the reference's (RMSE) is {plain}, from those of that {error}.",
        _SERVE,
    ),
    "served-no-instruction": broken(
        "{question}: the server ignores the instruction of the panel: the prompt has the same length with and without it.",
        _SERVE,
    ),
    "served-ignores-instructions": warning(
        "The server ignores instructions: the prompt has the same length with and without one. The panel has none."
    ),
    "served-pooling": broken(
        "The answers are pooled from {found}, expected the last token: with the reference's they agree by {plain}, with "
        "those pooled so by {cosine} (median cosine).",
        _SERVE,
    ),
    "served-other-prompt": broken(
        "The vectors are those of another prompt, {found}: their cosine with the reference's is {plain}, with those of that "
        "prompt {cosine}.",
        _SERVE,
    ),
    "served-not-normalized": broken(
        "The vectors have lengths of {low} to {high}, expected 1: the dot products of users differ from cosines.",
        _SERVE,
    ),
}
