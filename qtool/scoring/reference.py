"""The reference runtime: transformers, float32 unless asked otherwise, the official prompt and head.

Rule: only the last position's hidden state meets the head; the logits of the vocabulary are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from qtool.arch.detect import Detection, detect
from qtool.arch.prompts import embedder_prompt, reranker_prompt
from qtool.arch.spec import Presence, Task
from qtool.checkpoint.reader import Checkpoint, open_checkpoint
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.inventory.packed import is_quantized
from qtool.scoring.batches import DEFAULT_LIMITS, BatchLimits, windows
from qtool.scoring.contents import distinct_pairs
from qtool.scoring.dequantized import dequantized_weights
from qtool.scoring.forward import Forward
from qtool.scoring.head import answer_ids, difference_row, score_row
from qtool.scoring.identity import checkpoint_sha256, prompt_sha256
from qtool.scoring.model import LoadedModel, load_model
from qtool.scoring.prompt import Prompt, PromptBuilder
from qtool.scoring.scorer import Answered, Identity, PromptSeen, unheard
from qtool.scoring.shared import SharedReader
from qtool.scoring.tokenizer import PromptTokenizer
from qtool.scoring.weights import source_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ScorerOptions:
    """How to open a checkpoint: `dtype` is one of DTYPES, `device` a torch device or "auto"."""

    task: Task | None = None
    dtype: str = "float32"
    device: str = "auto"
    limits: BatchLimits = DEFAULT_LIMITS


class TransformersScorer:
    """One checkpoint behind the scorer protocol; where its weights came from makes no difference here."""

    def __init__(
        self,
        builder: PromptBuilder,
        forward: Forward,
        score_row: torch.Tensor | None,
        limits: BatchLimits,
        identity: Callable[[], Identity],
    ) -> None:
        self._builder = builder
        self._identity = identity
        self._reader = SharedReader(forward, limits)
        self._score_row = score_row
        self._limits = limits

    @cached_property
    def identity(self) -> Identity:
        """See Scorer. Reads the files whole."""
        return self._identity()

    @property
    def query_instruction(self) -> str | None:
        """See Scorer."""
        return self._builder.spec.query_instruction or None

    def score(self, pairs: Sequence[Pair], answered: Answered = unheard) -> list[float]:
        """See Scorer."""
        if self._score_row is None:
            raise UsageError("An embedder does not score pairs.", "Choose --task embed.")
        row = self._score_row
        places = distinct_pairs(pairs)
        prompts = (self._builder.pair(pairs[same[0]]) for same in places)
        return [float(value) for value in self._run(prompts, places, lambda hidden: hidden @ row, answered)]

    def embed(self, items: Sequence[Item], answered: Answered = unheard) -> NDArray[np.float32]:
        """See Scorer."""
        if self._score_row is not None:
            raise UsageError("A reranker does not embed items.", "Choose --task rerank.")
        places = [[place] for place in range(len(items))]
        prompts = (self._builder.item(item) for item in items)
        return np.stack(self._run(prompts, places, _unit, answered))

    def prompt_seen(self, question: Pair | Item) -> PromptSeen:
        """See Scorer."""
        prompt = self._builder.pair(question) if isinstance(question, Pair) else self._builder.item(question)
        return PromptSeen(prompt.token_ids, tuple(picture.grid_thw for picture in prompt.pictures))

    def close(self) -> None:
        """See Scorer."""

    def _run(
        self,
        prompts: Iterable[Prompt],
        places: Sequence[Sequence[int]],
        answer: Callable[[torch.Tensor], torch.Tensor],
        answered: Answered,
    ) -> list[NDArray[np.float32]]:
        """The answer of each prompt, put at all of its places."""
        results: dict[int, NDArray[np.float32]] = {}
        done = 0
        for window in windows(prompts, self._limits.window_tokens):
            for chosen, hidden in self._reader.last_hidden(window):
                values = answer(hidden).float().cpu().numpy()
                _check_finite(values, [window[index] for index in chosen])
                for place, value in (
                    (p, value) for i, value in zip(chosen, values, strict=True) for p in places[done + i]
                ):
                    results[place] = value
                    answered(place, value)
            done += len(window)
        return [results[place] for place in range(len(results))]


def _unit(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def _check_finite(values: NDArray[np.float32], prompts: Sequence[Prompt]) -> None:
    good = np.isfinite(values).reshape(len(prompts), -1).all(axis=1)
    if not good.all():
        raise ModelError(
            f"{prompts[int(good.argmin())].name}: the model's answer is not a finite number.",
            "Its weights are broken, or too large for the chosen --dtype.",
        )


def open_scorer(directory: Path, options: ScorerOptions = ScorerOptions()) -> TransformersScorer:
    """Load the checkpoint or NVFP4 artefact in `directory`; which of the two it is, config.json says."""
    detection = detect(directory, options.task)
    task = detection.require_task()
    loaded = load_model(detection, _weights(open_checkpoint(directory)), _dtype(options.dtype))
    tokenizer = PromptTokenizer.read(directory)
    is_vision = detection.architecture.is_vision
    row = _score_row(directory, detection, loaded, tokenizer) if task is Task.RERANK else None
    spec = reranker_prompt(is_vision=is_vision) if task is Task.RERANK else embedder_prompt(is_vision=is_vision)
    device = _device(options.device)
    forward = Forward.of(loaded, tokenizer, device)
    return TransformersScorer(
        PromptBuilder(tokenizer, spec),
        forward,
        None if row is None else row.to(device),
        options.limits,
        lambda: _identity(directory, spec, options.dtype, device),
    )


def _identity(directory: Path, spec: PromptSpec, dtype: str, device: torch.device) -> Identity:
    engine = f"transformers {version('transformers')}"
    return Identity(engine, checkpoint_sha256(directory), prompt_sha256(spec), f"{dtype} on {device.type}")


def _weights(checkpoint: Checkpoint) -> Iterable[tuple[str, NDArray[np.float32]]]:
    return dequantized_weights(checkpoint) if is_quantized(checkpoint.config) else source_weights(checkpoint)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}.", f"Known are {', '.join(DTYPES)}.")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _score_row(directory: Path, detection: Detection, loaded: LoadedModel, tokenizer: PromptTokenizer) -> torch.Tensor:
    if detection.architecture.head == "score":
        return score_row(loaded.head("score.weight"), detection.config)
    # A tied head lives in the embedding, even where the file holds a copy of it.
    tied = _is_tied(detection)
    vocabulary = loaded.base.get_input_embeddings().weight if tied else loaded.head("lm_head.weight")
    return difference_row(vocabulary.detach(), answer_ids(directory, tokenizer))


def _is_tied(detection: Detection) -> bool:
    tensors = detection.architecture.tensors(detection.config)
    return any(tensor.presence is Presence.DUPLICATE for tensor in tensors if tensor.hf_name == "lm_head.weight")
