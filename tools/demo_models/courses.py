"""Training the demo reranker (graded log-odds) and the demo embedder (cosines that grow with the grade)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from qtool.arch.prompts import NO, YES
from tools.demo_models.forward import (
    EMBED_HEAD,
    IGNORED,
    RERANK_HEAD,
    Batch,
    Past,
    collate,
    empty_past,
    encode_part,
    last_hidden,
    run_part,
    word_loss,
)
from tools.demo_models.lessons import Lesson, Teacher
from tools.demo_models.world import ATTRIBUTES

# Training the demo reranker: graded log-odds at the last token, verdicts and words on the way. The score is h ·
# (w_yes - w_no) at the last token, and its target is linear in the grade.


RERANK_QUERIES, RERANK_DOCUMENTS = 8, 6
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
class RerankerStep:
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

    def step(self, model: Qwen3VLForConditionalGeneration, number: int) -> RerankerStep:
        """One batch of queries, each with its documents, in the phase of step `number`."""
        phase = next((phase for phase in PHASES if number < phase.until), PHASES[-1])
        self._teacher.form_weights = phase.forms
        lessons = [self._teacher.rerank_lesson(RERANK_DOCUMENTS) for _ in range(RERANK_QUERIES)]
        queries = collate([lesson.query for lesson in lessons])
        documents = collate([part for lesson in lessons for part in lesson.documents])
        _, past = run_part(model, collate([self._heads[phase.full_prompt]]), empty_past())
        seen, past = run_part(model, queries, past.repeated(RERANK_QUERIES))
        hidden, _ = run_part(model, documents, past.repeated(RERANK_DOCUMENTS))
        word = word_loss(model, hidden, documents) + 0.5 * word_loss(model, seen, queries)
        verdict = _verdict_losses(self._log_odds(model, hidden), documents)
        final = self._log_odds(model, last_hidden(hidden, documents))
        target = torch.tensor(targets(lessons))
        score = torch.nn.functional.smooth_l1_loss(final, target)
        loss = torch.cat(verdict).mean() + 0.5 * word + phase.score_weight * score
        text, picture = (losses.mean().item() if len(losses) else 0.0 for losses in verdict)
        return RerankerStep(loss, text, picture, word.item(), (final - target).abs().mean().item())

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


# Training the demo embedder: cosines that grow with the grade, at three Matryoshka lengths. An embedding is the last
# token's normed state, cut to a prefix and then normalised. Were it a sum of five orthogonal attribute vectors, a
# query of m attributes and a document that matches a share f of them would have the cosine f·√(m/5); that reachable
# geometry is the target.


EMBED_QUERIES, EMBED_DOCUMENTS = 12, 4
PREFIXES = (64, 128, 256)
SHARPNESS = 10.0
# Words first: until then the ranking loss would drown them.
WORDS_UNTIL = 100


@dataclass(frozen=True)
class EmbedderStep:
    """The losses of one step; `error` is the mean |cosine - target| at full length."""

    loss: torch.Tensor
    rank: float
    word: float
    error: float

    def __str__(self) -> str:
        return f"rank {self.rank:.3f} word {self.word:.3f} error {self.error:.3f}"


class EmbedderCourse:
    """Draws lessons; every query of a batch is compared with every document."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._teacher = Teacher(tokenizer, seed, (0.5, 0.3, 0.2))
        self._head = encode_part(tokenizer, EMBED_HEAD)

    def step(self, model: Qwen3VLForConditionalGeneration, number: int) -> EmbedderStep:
        """One batch: all pairs have a grade, so all are taught."""
        lessons = [self._teacher.embed_lesson(EMBED_DOCUMENTS) for _ in range(EMBED_QUERIES)]
        _, past = run_part(model, collate([self._head]), empty_past())
        queries = collate([lesson.query for lesson in lessons])
        documents = collate([part for lesson in lessons for part in lesson.documents])
        asking, word_q = self._embed(model, queries, past)
        found, word_d = self._embed(model, documents, past)
        shares, reach = grades(lessons)
        losses = [_compare(asking[:, :k], found[:, :k], shares, reach) for k in PREFIXES]
        rank = torch.stack([loss for loss, _ in losses]).mean()
        word = word_d + 0.5 * word_q
        weight = 0.05 if number < WORDS_UNTIL else 0.5
        return EmbedderStep(weight * rank + 0.5 * word, rank.item(), word.item(), losses[-1][1])

    def _embed(
        self, model: Qwen3VLForConditionalGeneration, batch: Batch, past: Past
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, _ = run_part(model, batch, past.repeated(len(batch.ids)))
        return last_hidden(hidden, batch), word_loss(model, hidden, batch)


def grades(lessons: list[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """Matched shares [queries, documents], and the cosine [queries, 1] that a full match can reach."""
    scenes = [scene for lesson in lessons for scene in lesson.scenes]
    shares = torch.tensor([[lesson.wish.fraction(scene) for scene in scenes] for lesson in lessons])
    reach = torch.tensor([[math.sqrt(len(lesson.wish.asked) / len(ATTRIBUTES))] for lesson in lessons])
    return shares, reach


def _compare(
    queries: torch.Tensor, documents: torch.Tensor, shares: torch.Tensor, reach: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """List-wise cross-entropy against the graded shares (less its floor), plus the squared cosine error."""
    normalize = torch.nn.functional.normalize
    cosines = normalize(queries, dim=-1) @ normalize(documents, dim=-1).T
    wanted = torch.softmax(SHARPNESS * shares, dim=1)
    listwise = torch.nn.functional.kl_div(
        torch.log_softmax(SHARPNESS * cosines / reach, dim=1), wanted, reduction="batchmean"
    )
    error = cosines - shares * reach
    return listwise + 5 * error.square().mean(), error.abs().mean().item()
