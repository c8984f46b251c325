"""Training the demo reranker: graded log-odds at the last token, verdicts and words on the way.

Rule: the score is h · (w_yes - w_no) at the last token, and its target is linear in the grade.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from qtool.arch.prompts import NO, YES
from qtool.demo.encoding import IGNORED, Batch, collate, encode_part
from qtool.demo.forward import empty_past, last_hidden, run_part, word_loss
from qtool.demo.lessons import Lesson, Teacher
from qtool.demo.prompts import RERANK_HEAD

QUERIES, DOCUMENTS = 8, 6
# No match is -REACH, a full match +REACH log-odds: well apart, and far from a saturated sigmoid.
REACH = 5.0


@dataclass(frozen=True)
class Phase:
    """Until which step, with which document forms (picture, text, both) and prompt, at which score weight.

    A heavy score weight early drowns the dense targets: the grades cannot be learned before the matches.
    """

    until: int
    forms: tuple[float, float, float]
    full_prompt: bool
    score_weight: float


PHASES = (
    Phase(300, (0.35, 0.55, 0.1), full_prompt=False, score_weight=0.05),
    Phase(800, (0.6, 0.2, 0.2), full_prompt=False, score_weight=0.05),
    Phase(1500, (0.5, 0.25, 0.25), full_prompt=True, score_weight=0.3),
)


@dataclass(frozen=True)
class Step:
    """The losses of one step; `error` is the mean |log-odds - target| of the final scores."""

    loss: torch.Tensor
    text_verdict: float
    picture_verdict: float
    word: float
    error: float

    def __str__(self) -> str:
        verdicts = f"verdict text {self.text_verdict:.3f} picture {self.picture_verdict:.3f}"
        return f"{verdicts} word {self.word:.3f} error {self.error:.3f}"


class RerankerCourse:
    """Draws lessons and turns them into losses."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._teacher = Teacher(tokenizer, seed, PHASES[0].forms)
        self._heads = {True: encode_part(tokenizer, RERANK_HEAD), False: encode_part(tokenizer, "<Query>:")}
        self._ids = [tokenizer.token_to_id(word) for word in (YES, NO)]

    def step(self, model: Qwen3VLForConditionalGeneration, number: int) -> Step:
        """One batch of queries, each with its documents, in the phase of step `number`."""
        phase = next((phase for phase in PHASES if number < phase.until), PHASES[-1])
        self._teacher.form_weights = phase.forms
        lessons = [self._teacher.rerank_lesson(DOCUMENTS) for _ in range(QUERIES)]
        queries = collate([lesson.query for lesson in lessons])
        documents = collate([part for lesson in lessons for part in lesson.documents])
        _, past = run_part(model, collate([self._heads[phase.full_prompt]]), empty_past())
        seen, past = run_part(model, queries, past.repeated(QUERIES))
        hidden, _ = run_part(model, documents, past.repeated(DOCUMENTS))
        word = word_loss(model, hidden, documents) + 0.5 * word_loss(model, seen, queries)
        verdict = _verdict_losses(self._log_odds(model, hidden), documents)
        final = self._log_odds(model, last_hidden(hidden, documents))
        target = torch.tensor(targets(lessons))
        score = torch.nn.functional.smooth_l1_loss(final, target)
        loss = torch.cat(verdict).mean() + 0.5 * word + phase.score_weight * score
        text, picture = (losses.mean().item() if len(losses) else 0.0 for losses in verdict)
        return Step(loss, text, picture, word.item(), (final - target).abs().mean().item())

    def _log_odds(self, model: Qwen3VLForConditionalGeneration, hidden: torch.Tensor) -> torch.Tensor:
        yes, no = model.lm_head.weight[self._ids]
        log_odds: torch.Tensor = hidden @ (yes - no)
        return log_odds


def _verdict_losses(log_odds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every verdict asked for: of rows without a picture, and of rows with one."""
    losses = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, batch.verdicts.clamp(0), reduction="none")
    asked, pictured = batch.verdicts != IGNORED, (batch.grids > 0)[:, None]
    return losses[asked & ~pictured], losses[asked & pictured]


def targets(lessons: list[Lesson]) -> list[float]:
    """The wanted log-odds of every document, in batch order."""
    return [REACH * (2 * lesson.wish.fraction(scene) - 1) for lesson in lessons for scene in lesson.scenes]
