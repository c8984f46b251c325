"""Training the demo embedder: cosines that grow with the grade, at three Matryoshka lengths.

Rule: an embedding is the last token's normed state, cut to a prefix and then normalised. Were it a sum of five
orthogonal attribute vectors, a query of m attributes and a document that matches a share f of them would have the cosine
f·√(m/5); that reachable geometry is the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from qtool.demo.encoding import Batch, collate, encode_part
from qtool.demo.forward import Past, empty_past, last_hidden, run_part, word_loss
from qtool.demo.lessons import Lesson, Teacher
from qtool.demo.prompts import EMBED_HEAD
from qtool.demo.world import ATTRIBUTES

QUERIES, DOCUMENTS = 12, 4
PREFIXES = (64, 128, 256)
SHARPNESS = 10.0
# Words first: until then the ranking loss would drown them.
WORDS_UNTIL = 100


@dataclass(frozen=True)
class Step:
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

    def step(self, model: Qwen3VLForConditionalGeneration, number: int) -> Step:
        """One batch: all pairs have a grade, so all are taught."""
        lessons = [self._teacher.embed_lesson(DOCUMENTS) for _ in range(QUERIES)]
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
        return Step(weight * rank + 0.5 * word, rank.item(), word.item(), losses[-1][1])

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
