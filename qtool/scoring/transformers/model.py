"""A checkpoint's weights, dequantized where they are packed, in a transformers model with its rank head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from qtool.arch.prompts import NO, YES
from qtool.errors import ModelError, reason
from qtool.extras import importing
from qtool.jsonfile import read_json
from qtool.storage.packed import PackedWeight, packed_weights, read_global_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.storage.checkpoint import Checkpoint

    Float32 = NDArray[np.float32]
    from qtool.arch.detect import Detection
    from qtool.scoring.tokenizer import PromptTokenizer

# Weights as float32: widened exactly, or dequantized by their format.


def source_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Float32]]:
    """(hf_name, weight) of an unquantized checkpoint, one tensor at a time."""
    for hf_name in checkpoint.tensors:
        yield hf_name, read_float32(checkpoint, hf_name)


def read_float32(checkpoint: Checkpoint, hf_name: str) -> Float32:
    """One BF16, F16 or F32 tensor, widened into memory of its own."""
    dtype = checkpoint.tensors[hf_name].dtype
    stored = checkpoint.read(hf_name)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F16", "F32"):
        return np.array(stored, dtype=np.float32)
    raise ModelError(
        f"{hf_name} is stored as {dtype}; expected BF16, F16 or F32.",
        "Packed weights need a quantization_config in config.json.",
    )


# NVFP4 W4A16 weights (ModelOpt layout) as a W4A16 kernel sees them: vLLM's Marlin kernel multiplies E2M1 by its E4M3
# block scale, which a bf16 holds exactly (1 + 3 mantissa bits), accumulates in float32 and applies the float32 global
# scale there. So a weight is the float32 product of the three, not rounded to bf16.


def dequantized_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Float32]]:
    """(hf_name, weight), one at a time; packed weights are rebuilt from their three tensors."""
    packed = packed_weights(checkpoint)
    scales = {scale.hf_name for weight in packed.values() for scale in (weight.block_scales, weight.global_scale)}
    for hf_name in checkpoint.tensors:
        if hf_name not in scales:
            weight = packed.get(hf_name)
            yield hf_name, read_float32(checkpoint, hf_name) if weight is None else _dequantized(checkpoint, weight)


def _dequantized(checkpoint: Checkpoint, weight: PackedWeight) -> Float32:
    from qtool.formats.nvfp4_kernels import dequantize  # compiled: loading it takes half a second

    block_scales = checkpoint.read(weight.block_scales.hf_name)
    return dequantize(checkpoint.read(weight.packed.hf_name), block_scales, read_global_scale(checkpoint, weight))


# The rank head: one row that turns the last hidden state into the log-odds of "yes" against "no". The two tokens are
# declared by the checkpoint or looked up in its tokenizer.


@dataclass(frozen=True)
class AnswerIds:
    """The token ids of the two answers, and the file that gives them."""

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
        raise ModelError(
            f"{declared}: true_token_id and false_token_id are {yes!r} and {no!r}; expected two token ids."
        )
    return AnswerIds(yes, no, "1_LogitScore/config.json")


def difference_row(vocabulary_head: torch.Tensor, answers: AnswerIds) -> torch.Tensor:
    """w_yes - w_no [hidden] from the rows [vocab, hidden]; rounded to their dtype, as the official class does."""
    for token in (answers.yes, answers.no):
        if token >= vocabulary_head.shape[0]:
            raise ModelError(f"{answers.source} names token {token}; the head has {vocabulary_head.shape[0]} rows.")
    return vocabulary_head[answers.yes] - vocabulary_head[answers.no]


def score_row(score_head: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The row [hidden] of a `score` head: its only one, or "yes" minus "no" of two."""
    if score_head.shape[0] == 1:
        return score_head[0]
    if score_head.shape[0] != 2:
        raise ModelError(f"score.weight has {score_head.shape[0]} rows; expected one, or two (no and yes).")
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


# The model, filled from named weights. Every parameter must be filled by exactly one tensor of its shape, and every
# tensor used: transformers alone would only warn, and score with random numbers.

HEADS: Final[tuple[str, ...]] = ("lm_head.weight", "score.weight")
_MAX_LISTED: Final = 3


@dataclass(frozen=True)
class LoadedModel:
    """The base model (no head), its transformers config, and the head tensors of the checkpoint."""

    base: Any
    config: Any
    heads: Mapping[str, torch.Tensor]

    def head(self, hf_name: str) -> torch.Tensor:
        """A head tensor that the task needs."""
        if hf_name not in self.heads:
            raise ModelError(f"The checkpoint has no {hf_name}, which a reranker needs to score.")
        return self.heads[hf_name]


def load_model(detection: Detection, weights: Iterable[tuple[str, Float32]], dtype: torch.dtype) -> LoadedModel:
    """The architecture's base model, filled with `weights`, on the CPU."""
    model_class, config = _model_class(detection)
    tensors = {name: torch.from_numpy(weight).to(dtype) for name, weight in weights}
    heads = {name: tensors.pop(name) for name in HEADS if name in tensors}
    # Checkpoints of a base model (Qwen3-Embedding) have no prefix.
    state = {name.removeprefix(detection.architecture.prefix): tensor for name, tensor in tensors.items()}
    expected = _expected(model_class, config)
    _check(state, expected)
    with _without_progress_bar():
        base = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return LoadedModel(base.eval(), config, heads)


def _model_class(detection: Detection) -> tuple[Any, Any]:
    with importing("score"):
        import transformers

        config_class = getattr(transformers, detection.family.config_class)
        model_class = getattr(transformers, detection.family.model_class)
    # The weights are dequantized before they are loaded; transformers has no loader for the format.
    fields = {key: value for key, value in detection.config.items() if key != "quantization_config"}
    try:
        return model_class, config_class.from_dict(fields)
    except Exception as error:  # whatever stumbles over a value of another type
        raise ModelError(f"transformers cannot read config.json: {' '.join(reason(error).split())}.") from error


def _expected(model_class: Any, config: Any) -> Mapping[str, torch.Tensor]:
    try:
        with torch.device("meta"):
            state: Mapping[str, torch.Tensor] = model_class(config).state_dict()
    except Exception as error:  # a size of zero, a negative one, one that does not fit another
        raise ModelError(
            f"transformers cannot build the model that config.json describes: {' '.join(reason(error).split())}."
        ) from error
    return state


def _check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    if missing:
        raise ModelError(f"The checkpoint has no {_listed(missing)}.")
    if unexpected:
        raise ModelError(f"The checkpoint contains {_listed(unexpected)}, which the architecture does not have.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{name} has shape {list(tensor.shape)}; the config requires {list(expected[name].shape)}."
            )


def _listed(names: list[str]) -> str:
    listed = ", ".join(names[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return f"{listed} and {more} more tensors" if more > 0 else listed


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
