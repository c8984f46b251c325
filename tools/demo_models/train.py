"""Train the demo models: `python -m tools.demo_models.train reranker|embedder|all [-o FOLDER]`.

One seed, a fixed number of steps, a CPU; nothing is downloaded, and the reranker starts from random weights.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import Qwen3VLForConditionalGeneration

from tools.demo_models.checkpoint import model_folder, new_model, read_model, write_model
from tools.demo_models.courses import EmbedderCourse, RerankerCourse
from tools.demo_models.tokenizer import build_tokenizer

log = logging.getLogger("demo_models")


class Outcome(Protocol):
    """What a step of a course returns; its text is a line of the log."""

    @property
    def loss(self) -> torch.Tensor:
        """The scalar to minimise."""
        ...


class Course(Protocol):
    """A source of training steps."""

    def step(self, model: Qwen3VLForConditionalGeneration, number: int) -> Outcome:
        """The losses of a fresh batch."""
        ...


@dataclass(frozen=True)
class Leg:
    """A stretch of training with an optimizer of its own: a linear warm-up, then a cosine to `floor` of the peak.

    `horizon` is the step at which the cosine would end; a leg may stop before, and the next one starts warm.
    """

    first: int
    last: int
    horizon: int
    peak: float = 1e-3
    warmup: int = 100
    floor: float = 0.05

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        done = step - self.first
        if done < self.warmup:
            return self.peak * (done + 1) / self.warmup
        progress = min(1.0, (done - self.warmup) / max(1, self.horizon - self.first - self.warmup))
        return self.peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)


LEGS = {
    "reranker": (
        Leg(0, 600, horizon=2200),
        Leg(600, 900, horizon=1700, peak=8e-4, warmup=50),
        Leg(900, 1500, horizon=1500, peak=8e-4, warmup=25),
    ),
    # The embedder starts from the reranker: reading words and pictures is learned once.
    "embedder": (
        Leg(0, 300, horizon=800, peak=6e-4, warmup=50),
        Leg(300, 600, horizon=600, peak=6e-4, warmup=25),
    ),
}
SEEDS = {"reranker": 1, "embedder": 2}
LOG_EVERY, SAVE_EVERY = 25, 100


def train(task: str, folder: Path, legs: Sequence[Leg], start: Path | None = None) -> None:
    """Train one model, from scratch or from the checkpoint folder `start`.

    It is written every hundred steps, so that a usable one is always there.
    """
    tokenizer = build_tokenizer()
    model = read_model(start) if start else new_model(tokenizer, SEEDS[task])
    model.train()
    for leg in legs:
        seed = SEEDS[task] + leg.first
        course: Course = RerankerCourse(tokenizer, seed) if task == "reranker" else EmbedderCourse(tokenizer, seed)
        _run(model, course, leg, lambda: write_model(model, tokenizer, task, folder))


def _run(model: Qwen3VLForConditionalGeneration, course: Course, leg: Leg, save: Callable[[], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began = time.monotonic()
    for step in range(leg.first, leg.last):
        outcome = _update(model, course, optimizer, step, leg.rate(step))
        if step % LOG_EVERY == 0:
            log.info("step %d loss %.3f %s %.0f s", step, outcome.loss.item(), outcome, time.monotonic() - began)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == leg.last:
            save()


def _update(
    model: Qwen3VLForConditionalGeneration, course: Course, optimizer: torch.optim.AdamW, step: int, rate: float
) -> Outcome:
    for group in optimizer.param_groups:
        group["lr"] = rate
    outcome = course.step(model, step)
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return outcome


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["reranker", "embedder", "all"])
    parser.add_argument(
        "-o", "--output", type=Path, help="parent folder of the models (default: the shipped ones are replaced)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 1 on a machine that is shared")
    parser.add_argument("--leg", type=int, default=0, help="start at this leg, from the model in the output folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    for task in ["reranker", "embedder"] if arguments.task == "all" else [arguments.task]:
        folder = model_folder(task, arguments.output)
        scratch = task == "reranker" and not arguments.leg
        start = None if scratch else folder if arguments.leg else model_folder("reranker", arguments.output)
        train(task, folder, LEGS[task][arguments.leg :], start)


if __name__ == "__main__":
    main()
