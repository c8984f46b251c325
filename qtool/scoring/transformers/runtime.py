"""The reference runtime: transformers, float32 unless asked otherwise, the official prompt and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from typing_extensions import override

from qtool.arch.spec import Presence, Task, dimension
from qtool.artefact import CheckpointArtefact
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.options import Memory, parse_size
from qtool.progress import ignore
from qtool.scoring.prompt import Prompt, PromptBuilder
from qtool.scoring.scorer import (
    Answered,
    Identity,
    PromptSeen,
    Scorer,
    checkpoint_sha256,
    distinct_pairs,
    prompt_sha256,
)
from qtool.scoring.tokenizer import PromptTokenizer
from qtool.scoring.transformers.footprint import Footprint, layerwise_budget
from qtool.scoring.transformers.layerwise import LayerwiseModel, LayerwiseReader
from qtool.scoring.transformers.model import (
    SCORE_HEAD,
    VOCABULARY_HEAD,
    StoredWeights,
    answer_ids,
    difference_row,
    empty_model,
    input_embedding,
    load_model,
    score_row,
)
from qtool.scoring.transformers.prefix import (
    DEFAULT_LIMITS,
    BatchLimits,
    Forward,
    PromptReader,
    SharedReader,
    picture_tokens,
)
from qtool.storage.hub import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.detect import Detection
    from qtool.arch.prompts import PromptSpec
    from qtool.storage.checkpoint import Checkpoint

# Loading: the weights, stored or dequantized, into a model, and the row that turns its last hidden state into a score.


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint of which only the headers have been read."""

    checkpoint: Checkpoint
    detection: Detection
    task: Task
    tokenizer: PromptTokenizer


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model that reads prompts; `answer` turns last hidden states [n, hidden] into log-odds [n] or unit vectors."""

    reader: PromptReader
    answer: Callable[[torch.Tensor], torch.Tensor]


def load(
    opened: OpenCheckpoint, dtype: torch.dtype, device: torch.device, limits: BatchLimits, memory: Memory
) -> LoadedCheckpoint:
    """Read the weights, or arrange that they are read layer by layer."""
    weights = StoredWeights(opened.checkpoint)
    empty = empty_model(opened.detection, weights)
    tokens = picture_tokens(empty, opened.tokenizer)
    budget = layerwise_budget(Footprint.of(empty, dtype), device, memory)
    answer = _answer(opened, weights, dtype, device)
    if budget is not None:
        model = LayerwiseModel(empty, opened.detection, weights, tokens, dtype, device)
        return LoadedCheckpoint(LayerwiseReader(model, limits, budget), answer)
    base = load_model(opened.detection, weights, empty, dtype)
    return LoadedCheckpoint(SharedReader(Forward(base.to(device), device, tokens), limits), answer)


def _answer(
    opened: OpenCheckpoint, weights: StoredWeights, dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    if opened.task is Task.EMBED:
        return _unit
    row = _score_row(opened, weights, dtype).to(device)
    return lambda hidden: hidden @ row


def _unit(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def _score_row(opened: OpenCheckpoint, weights: StoredWeights, dtype: torch.dtype) -> torch.Tensor:
    detection = opened.detection
    # A tied head is the embedding, even where the file contains a copy of it.
    embedding = input_embedding(weights) if _is_tied(detection) else None
    hf_name = SCORE_HEAD if detection.architecture.head == "score" else embedding or VOCABULARY_HEAD
    if hf_name not in weights.shapes:
        raise ModelError(f"The checkpoint has no {hf_name}, which a reranker needs to score.")
    if hf_name == SCORE_HEAD:
        return score_row(torch.from_numpy(weights.read(hf_name)).to(dtype), detection.config)
    return difference_row(weights, hf_name, answer_ids(opened.checkpoint.directory, opened.tokenizer), dtype)


def _is_tied(detection: Detection) -> bool:
    tensors = detection.architecture.tensors(detection.config)
    return any(tensor.presence is Presence.DUPLICATE for tensor in tensors if tensor.hf_name == VOCABULARY_HEAD)


# The scorer. The head is applied to the last position's hidden state only; the vocabulary's logits are never computed.

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ScorerOptions:
    """How to open a checkpoint: `dtype` is one of DTYPES, `device` a torch device or "auto".

    With a `memory`, in bytes, the model runs layer by layer within it; "auto" does so where it does not fit whole.
    """

    task: Task | None = None
    dtype: str = "float32"
    device: str = "auto"
    limits: BatchLimits = DEFAULT_LIMITS
    memory: Memory = "auto"


class TransformersScorer(Scorer):
    """One checkpoint; its weights are loaded at the first question."""

    def __init__(
        self,
        opened: OpenCheckpoint,
        builder: PromptBuilder,
        options: ScorerOptions,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._opened = opened
        self._builder = builder
        self._options = options
        self._dtype = dtype
        self._device = device
        self._model: LoadedCheckpoint | None = None

    @property
    @override
    def task(self) -> Task:
        return self._opened.task

    @property
    @override
    def family(self) -> str:
        return self._opened.detection.architecture.family

    @cached_property
    @override
    def identity(self) -> Identity:
        """Hashing it reads the files whole."""
        return Identity(
            f"transformers {version('transformers')}, torch {version('torch')}",
            checkpoint_sha256(self._opened.checkpoint.directory),
            prompt_sha256(self._builder.spec),
            f"{self._options.dtype} on {self._device.type}",
        )

    @property
    @override
    def query_instruction(self) -> str | None:
        return self._builder.spec.query_instruction or None

    @property
    @override
    def dimensions(self) -> int:
        config = self._opened.detection.config
        return dimension(config.get("text_config", config), "hidden_size")

    @override
    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        if self.task is not Task.RERANK:
            raise UsageError("The model is an embedder and cannot score pairs.", "Pass --task embed.")
        groups = distinct_pairs(pairs)
        prompts = (self.prompt(pairs[equal[0]]) for equal in groups)
        return [float(value) for value in self._run(prompts, groups, answered)]

    @override
    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        if self.task is not Task.EMBED:
            raise UsageError("The model is a reranker and cannot embed items.", "Pass --task rerank.")
        groups = [[index] for index in range(len(items))]
        prompts = map(self.prompt, items)
        return np.stack(self._run(prompts, groups, answered))

    def prompt(self, question: Pair | Item) -> Prompt:
        """What the model reads for a question."""
        return self._builder.pair(question) if isinstance(question, Pair) else self._builder.item(question)

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen:
        prompt = self.prompt(question)
        return PromptSeen(prompt.token_ids, tuple(picture.grid_thw for picture in prompt.pictures))

    def under(self, prompt: PromptSpec) -> TransformersScorer:
        """The same loaded model with another prompt."""
        builder = PromptBuilder(self._opened.tokenizer, prompt)
        other = TransformersScorer(self._opened, builder, self._options, self._dtype, self._device)
        other._model = self.loaded
        return other

    def pooled(self, questions: Sequence[Pair | Item]) -> Mapping[str, NDArray[np.float32]]:
        """The answers that other poolings than that of the last token would give; none where layers are read one by one."""
        reader = self.loaded.reader
        if not isinstance(reader, SharedReader):
            return {}
        forward = reader.forward
        hidden = [forward.hidden(forward.span(self.prompt(each))) for each in questions]
        pools = {"mean of all tokens": [each.mean(0) for each in hidden], "first token": [each[0] for each in hidden]}
        return {name: self.loaded.answer(torch.stack(each)).float().cpu().numpy() for name, each in pools.items()}

    @override
    def close(self) -> None:
        """Free the model; the next question loads it again."""
        self._model = None

    def layers(self) -> LayerwiseModel:
        """The model as it is read layer by layer, beside what answers questions."""
        weights = StoredWeights(self._opened.checkpoint)
        empty = empty_model(self._opened.detection, weights)
        tokens = picture_tokens(empty, self._opened.tokenizer)
        return LayerwiseModel(empty, self._opened.detection, weights, tokens, self._dtype, self._device)

    def answer(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns last hidden states [n, hidden] into log-odds [n] or unit vectors, without the model."""
        return _answer(self._opened, StoredWeights(self._opened.checkpoint), self._dtype, self._device)

    @property
    def loaded(self) -> LoadedCheckpoint:
        """The model, whose weights are read when it is first needed."""
        if self._model is None:
            self._model = load(self._opened, self._dtype, self._device, self._options.limits, self._options.memory)
        return self._model

    @property
    def _reader(self) -> PromptReader:
        return self.loaded.reader

    def _run(
        self, prompts: Iterable[Prompt], groups: Sequence[Sequence[int]], answered: Answered
    ) -> list[NDArray[np.float32]]:
        """The answers by question; `groups` are the indices of the questions that each prompt answers."""
        results: dict[int, NDArray[np.float32]] = {}
        done, reader = 0, self._reader
        for window in reader.windows(prompts):
            for chosen, hidden in reader.last_hidden(window):
                values = self.loaded.answer(hidden).float().cpu().numpy()
                _check_finite(values, [window[index] for index in chosen])
                for prompt, value in zip(chosen, values, strict=True):
                    for index in groups[done + prompt]:
                        results[index] = value
                        answered(index, value)
            done += len(window)
        return [results[index] for index in range(len(results))]


def _check_finite(values: NDArray[np.float32], prompts: Sequence[Prompt]) -> None:
    good = np.isfinite(values).reshape(len(prompts), -1).all(axis=1)
    if not good.all():
        raise ModelError(
            f"{prompts[int(good.argmin())].name}: The model's answer is not a finite number.",
            "Check the weights; they may be too large for the chosen --dtype.",
        )


def open_scorer(artefact: Path | CheckpointArtefact, options: ScorerOptions = ScorerOptions()) -> TransformersScorer:
    """Open a checkpoint or an NVFP4 artefact, by its folder or opened before; reads headers and the tokenizer, no weights."""
    if isinstance(artefact, Path):
        artefact = CheckpointArtefact(Source(artefact, artefact.name), options.task)
    detection = artefact.detection
    task = options.task or detection.require_task()
    opened = OpenCheckpoint(artefact.checkpoint, detection, task, PromptTokenizer.read(artefact.path))
    builder = PromptBuilder(opened.tokenizer, detection.family.prompt(task))
    if options.memory != "auto":
        options = replace(options, memory=parse_size(options.memory))
    return TransformersScorer(opened, builder, options, _dtype(options.dtype), _device(options.device))


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"Unknown --dtype {name!r}.", f"Choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
