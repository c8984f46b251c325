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
from qtool.storage.checkpoint import DTYPES
from qtool.storage.packed import PackedWeight, is_quantized, packed_weights, read_global_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.storage.checkpoint import Checkpoint

    Float32 = NDArray[np.float32]
    from qtool.arch.detect import Detection
    from qtool.scoring.tokenizer import PromptTokenizer

# Weights as float32: widened exactly, or dequantized by their format. NVFP4 W4A16 weights (ModelOpt layout) are read as a
# W4A16 kernel sees them: vLLM's Marlin kernel multiplies E2M1 by its E4M3 block scale, which a bf16 holds exactly (1 + 3
# mantissa bits), accumulates in float32 and applies the float32 global scale there. So a weight is the float32 product of
# the three, not rounded to bf16.


class StoredWeights:
    """The weights of a checkpoint, quantized or not: their shapes by hf_name, and each as float32, one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._packed = packed_weights(checkpoint) if is_quantized(checkpoint.config) else {}
        scales = {s.hf_name for weight in self._packed.values() for s in (weight.block_scales, weight.global_scale)}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            hf_name: self._packed[hf_name].shape if hf_name in self._packed else info.shape
            for hf_name, info in checkpoint.tensors.items()
            if hf_name not in scales
        }

    def read(self, hf_name: str) -> Float32:
        """One weight, in memory of its own."""
        packed = self._packed.get(hf_name)
        if packed is not None:
            return _dequantized(self._checkpoint, packed)
        self.check_type(hf_name)
        stored = self._checkpoint.read(hf_name)
        return stored if stored.dtype == np.float32 else _widened(stored)

    def rows(self, hf_name: str, rows: Iterable[int]) -> Float32:
        """These rows of a matrix such as an embedding, of which nothing else is read unless it is packed."""
        if hf_name in self._packed:
            return self.read(hf_name)[list(rows)]
        self.check_type(hf_name)
        info = self._checkpoint.tensors[hf_name]
        nbytes = info.nbytes // info.shape[0]
        chosen = list(rows)
        data = np.empty((len(chosen), nbytes), np.uint8)
        for target, row in zip(data, chosen, strict=True):
            self._checkpoint.read_into(info, row * nbytes, target)
        stored = data.view(DTYPES[info.dtype])
        return stored if stored.dtype == np.float32 else _widened(stored)

    def check_type(self, hf_name: str) -> None:
        """Raise ModelError unless the weight is packed, or of a type that widens exactly."""
        dtype = self._checkpoint.tensors[hf_name].dtype
        if hf_name not in self._packed and dtype not in ("BF16", "F16", "F32"):
            raise ModelError(
                f"{hf_name} is stored as {dtype}; expected BF16, F16 or F32.",
                "Packed weights need a quantization_config in config.json.",
            )


def _widened(stored: NDArray[Any]) -> Float32:
    """BF16 as raw bits, or F16, as float32."""
    if stored.dtype == np.float16:
        return stored.astype(np.float32)
    bits = np.empty(stored.shape, np.uint32)
    np.left_shift(stored, np.uint32(16), out=bits)  # in one pass: `astype` first would need as much memory again
    return bits.view(np.float32)


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


def input_embedding(weights: StoredWeights) -> str:
    """The hf_name of the vocabulary's embedding."""
    return next(hf_name for hf_name in weights.shapes if hf_name.endswith(_EMBEDDING))


def difference_row(weights: StoredWeights, hf_name: str, answers: AnswerIds, dtype: torch.dtype) -> torch.Tensor:
    """w_yes - w_no [hidden] from two rows of a vocabulary; rounded to `dtype`, as the official class does."""
    for token in (answers.yes, answers.no):
        if token >= weights.shapes[hf_name][0]:
            raise ModelError(f"{answers.source} names token {token}; the head has {weights.shapes[hf_name][0]} rows.")
    rows = torch.from_numpy(weights.rows(hf_name, (answers.yes, answers.no))).to(dtype)
    return rows[0] - rows[1]


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

VOCABULARY_HEAD: Final = "lm_head.weight"
SCORE_HEAD: Final = "score.weight"
HEADS: Final = (VOCABULARY_HEAD, SCORE_HEAD)
_EMBEDDING: Final = "embed_tokens.weight"
_MAX_LISTED: Final = 3


def load_model(detection: Detection, weights: StoredWeights, empty: Any, dtype: torch.dtype) -> Any:
    """The model that `empty` is, filled with `weights`, on the CPU."""
    state = {
        base_name(detection, hf_name): torch.from_numpy(weights.read(hf_name)).to(dtype)
        for hf_name in weights.shapes
        if hf_name not in HEADS
    }
    with without_progress_bar():
        return type(empty).from_pretrained(None, config=empty.config, state_dict=state, dtype=dtype).eval()


def base_name(detection: Detection, hf_name: str) -> str:
    """What the base model calls a weight; checkpoints of a base model (embedders) leave the prefix out."""
    return hf_name.removeprefix(detection.architecture.prefix)


def empty_model(detection: Detection, weights: StoredWeights) -> Any:
    """The architecture's base model (no head) on the device `meta`: shapes, to which those of `weights` are held."""
    with importing("score"):
        import transformers

        config_class = getattr(transformers, detection.family.config_class)
        model_class = getattr(transformers, detection.family.model_class)
    # The weights are dequantized before they are loaded; transformers has no loader for the format.
    fields = {key: value for key, value in detection.config.items() if key != "quantization_config"}
    try:
        config = config_class.from_dict(fields)
    except Exception as error:  # whatever stumbles over a value of another type
        raise ModelError(f"transformers cannot read config.json: {' '.join(reason(error).split())}.") from error
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
    except Exception as error:  # a size of zero, a negative one, one that does not fit another
        raise ModelError(
            f"transformers cannot build the model that config.json describes: {' '.join(reason(error).split())}."
        ) from error
    _check_shapes(detection, weights, model.state_dict())
    return model


def _check_shapes(detection: Detection, weights: StoredWeights, expected: Mapping[str, torch.Tensor]) -> None:
    for hf_name in weights.shapes:
        weights.check_type(hf_name)
    shapes = {base_name(detection, name): shape for name, shape in weights.shapes.items() if name not in HEADS}
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    if missing:
        raise ModelError(f"The checkpoint has no {_listed(missing)}.")
    if unexpected:
        raise ModelError(f"The checkpoint contains {_listed(unexpected)}, which the architecture does not have.")
    for name, shape in shapes.items():
        if shape != tuple(expected[name].shape):
            raise ModelError(f"{name} has shape {list(shape)}; the config requires {list(expected[name].shape)}.")


def _listed(names: list[str]) -> str:
    listed = ", ".join(names[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return f"{listed} and {more} more tensors" if more > 0 else listed


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own while it fills a model."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
