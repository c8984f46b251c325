"""A checkpoint's weights into a model that can be asked, and the row that turns its last hidden state into a score.

Rule: where the weights came from, stored or dequantized, shows nowhere above this room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qtool.arch.spec import Presence, Task
from qtool.inventory.packed import is_quantized
from qtool.scoring.dequantized import dequantized_weights
from qtool.scoring.forward import Forward
from qtool.scoring.head import answer_ids, difference_row, score_row
from qtool.scoring.model import LoadedModel, load_model
from qtool.scoring.weights import source_weights

if TYPE_CHECKING:
    from qtool.arch.detect import Detection
    from qtool.checkpoint.reader import Checkpoint
    from qtool.scoring.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which only the headers have been read."""

    checkpoint: Checkpoint
    detection: Detection
    task: Task
    tokenizer: PromptTokenizer


@dataclass(frozen=True)
class Loaded:
    """The model on its device; `answer` turns last hidden states [n, hidden] into log-odds [n] or unit vectors."""

    forward: Forward
    answer: Callable[[torch.Tensor], torch.Tensor]


def load(opened: Opened, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Read the weights; which of the two kinds they are, config.json says."""
    checkpoint = opened.checkpoint
    read = dequantized_weights if is_quantized(checkpoint.config) else source_weights
    model = load_model(opened.detection, read(checkpoint), dtype)
    forward = Forward.of(model, opened.tokenizer, device)
    if opened.task is Task.EMBED:
        return Loaded(forward, _unit)
    row = _score_row(opened, model).to(device)
    return Loaded(forward, lambda hidden: hidden @ row)


def _unit(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def _score_row(opened: Opened, model: LoadedModel) -> torch.Tensor:
    detection = opened.detection
    if detection.architecture.head == "score":
        return score_row(model.head("score.weight"), detection.config)
    # A tied head lives in the embedding, even where the file holds a copy of it.
    vocabulary = model.base.get_input_embeddings().weight if _is_tied(detection) else model.head("lm_head.weight")
    return difference_row(vocabulary.detach(), answer_ids(opened.checkpoint.directory, opened.tokenizer))


def _is_tied(detection: Detection) -> bool:
    tensors = detection.architecture.tensors(detection.config)
    return any(tensor.presence is Presence.DUPLICATE for tensor in tensors if tensor.hf_name == "lm_head.weight")
