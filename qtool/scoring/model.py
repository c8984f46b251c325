"""A transformers model filled from named weights.

Rule: strict. Every parameter is filled by exactly one tensor of the right shape and every tensor is used, or a
ModelError names those that are not; transformers alone would only warn, and score with random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from qtool.errors import ModelError

if TYPE_CHECKING:
    from qtool.arch.detect import Detection
    from qtool.scoring.weights import Float32

HEADS: Final[tuple[str, ...]] = ("lm_head.weight", "score.weight")
_NAMED_IN_MESSAGE: Final = 3


@dataclass(frozen=True)
class LoadedModel:
    """The base model (no head), its transformers config, and the head tensors that lay beside it."""

    base: Any
    config: Any
    heads: Mapping[str, torch.Tensor]

    def head(self, hf_name: str) -> torch.Tensor:
        """A head tensor that the task needs."""
        if hf_name not in self.heads:
            raise ModelError(f"The checkpoint lacks {hf_name}, without which a reranker has no score.")
        return self.heads[hf_name]


def load_model(detection: Detection, weights: Iterable[tuple[str, Float32]], dtype: torch.dtype) -> LoadedModel:
    """Build the architecture's base model and fill it, on the CPU."""
    model_class, config = _model_class(detection)
    tensors = {name: torch.from_numpy(weight).to(dtype) for name, weight in weights}
    heads = {name: tensors.pop(name) for name in HEADS if name in tensors}
    state = _without_prefix(tensors, detection.architecture.prefix)
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    _check(state, expected)
    with _quiet():
        base = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return LoadedModel(base.eval(), config, heads)


def _model_class(detection: Detection) -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel

    # The quantization is undone before the model sees its weights; transformers has no loader for it.
    fields = {key: value for key, value in detection.config.items() if key != "quantization_config"}
    if detection.architecture.is_vision:
        return Qwen3VLModel, Qwen3VLConfig.from_dict(fields)
    return Qwen3Model, Qwen3Config.from_dict(fields)


def _without_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    # Base-model checkpoints (Qwen3-Embedding) leave the prefix out altogether.
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    if missing:
        raise ModelError(f"The checkpoint lacks {_listed(missing)}.")
    if unexpected:
        raise ModelError(f"The checkpoint holds {_listed(unexpected)}, which the architecture does not have.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{name} has shape {list(tensor.shape)}, the config says {list(expected[name].shape)}.")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_IN_MESSAGE])
    more = len(names) - _NAMED_IN_MESSAGE
    return f"{shown} and {more} more tensors" if more > 0 else shown


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
