"""The rank head: one row that turns the last hidden state into the log-odds of "yes" against "no".

Rule: which tokens answer is declared by the checkpoint, or derived from its tokenizer, and never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.arch.prompts import NO, YES
from qtool.errors import ModelError
from qtool.jsonfile import read_json

if TYPE_CHECKING:
    import torch

    from qtool.scoring.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class AnswerIds:
    """The vocabulary rows of the two answers, and what named them."""

    yes: int
    no: int
    source: str


def answer_ids(directory: Path, tokenizer: PromptTokenizer) -> AnswerIds:
    """What `1_LogitScore/config.json` declares, else the tokenizer's ids of "yes" and "no"."""
    declared = directory / "1_LogitScore" / "config.json"
    if not declared.is_file():
        return AnswerIds(tokenizer.word_id(YES), tokenizer.word_id(NO), "tokenizer.json")
    config = read_json(declared)
    yes, no = config.get("true_token_id"), config.get("false_token_id")
    if not _is_id(yes) or not _is_id(no):
        raise ModelError(f"{declared}: true_token_id and false_token_id are {yes!r} and {no!r}, not two token ids.")
    return AnswerIds(yes, no, "1_LogitScore/config.json")


def difference_row(vocabulary_head: torch.Tensor, answers: AnswerIds) -> torch.Tensor:
    """w_yes - w_no [hidden] from the rows [vocab, hidden]; rounded to their dtype, as the official class does."""
    for token in (answers.yes, answers.no):
        if token >= vocabulary_head.shape[0]:
            raise ModelError(f"{answers.source} names token {token}, the head has {vocabulary_head.shape[0]} rows.")
    return vocabulary_head[answers.yes] - vocabulary_head[answers.no]


def score_row(score_head: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The row [hidden] of a `score` head: its only one, or "yes" minus "no" of two."""
    if score_head.shape[0] == 1:
        return score_head[0]
    if score_head.shape[0] != 2:
        raise ModelError(f"score.weight has {score_head.shape[0]} rows; a reranker has one, or two (no and yes).")
    yes = _yes_row(config)
    return score_head[yes] - score_head[1 - yes]


def _yes_row(config: Mapping[str, Any]) -> int:
    for index, label in dict(config.get("id2label") or {}).items():
        if str(label).lower() == YES:
            return int(index)
    # vLLM's converter writes classifier_from_token ["no", "yes"], and transformers numbers the positive class 1.
    tokens = config.get("classifier_from_token") or [NO, YES]
    return tokens.index(YES) if YES in tokens else 1


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
