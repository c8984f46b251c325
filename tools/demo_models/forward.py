"""Training forward passes: prompts as padded tensors, parts run one after the other over a shared cache."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen3VLForConditionalGeneration

from qtool.arch.prompts import IMAGE_PAD, VISION_END, VISION_START, VL_EMBEDDER, VL_RERANKER, PromptSpec
from qtool.inputs.pictures import PatchedImage

# The official prompts in the pieces that training runs one after the other. Cut from the data in
# `qtool.arch.prompts`; not a word of a prompt stands here.


def _pieces(prompt: PromptSpec) -> list[str]:
    """What stands around the sides of a prompt, under its default instruction."""
    template = prompt.template.replace("{instruction}", prompt.default_instruction)
    return re.split(r"\{(?:query|document|content)\}", template)


RERANK_HEAD, BETWEEN, TAIL = _pieces(VL_RERANKER)
EMBED_HEAD = _pieces(VL_EMBEDDER)[0]  # what follows the content is TAIL again
RERANK_SYSTEM = RERANK_HEAD.partition("system\n")[2].partition("<|im_end|>")[0]


def side_prompt(text: str, picture: PatchedImage | None = None) -> str:
    """A query or document as the prompt shows it: first the picture, then the text."""
    placeholders = f"{VISION_START}{IMAGE_PAD * picture.placeholder_tokens}{VISION_END}" if picture else ""
    return placeholders + text or VL_RERANKER.empty_side


# Prompts as padded tensors: token ids, M-RoPE positions, patches, and the dense targets of training. A part (head,
# query, document) is encoded alone only where the tokenizer cuts there anyway.


IGNORED = -100


@dataclass
class Part:
    """A stretch of one prompt. Targets are by token index: a word to predict, or a verdict (yes = 1)."""

    ids: list[int]
    positions: NDArray[np.int64]  # [3, tokens], from 0: time, height, width
    span: int  # how far the positions of the next part move on
    picture: PatchedImage | None = None
    words: dict[int, int] = field(default_factory=dict)
    verdicts: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Right-padded parts. Shapes: ids [n, t], positions [3, n, t], last [n], patches of all pictures in row order."""

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    spans: torch.Tensor
    grids: torch.Tensor  # [n]: how many pictures a row has, 0 or 1
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None
    words: torch.Tensor  # token id, or IGNORED
    verdicts: torch.Tensor  # 0, 1, or IGNORED


def encode_part(tokenizer: Tokenizer, text: str, picture: PatchedImage | None = None) -> Part:
    """A stretch of a prompt whose placeholders, if any, stand for `picture`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pad = tokenizer.token_to_id(IMAGE_PAD)
    start = ids.index(pad) if picture else len(ids)
    positions, span = _positions(len(ids), start, picture)
    return Part(ids, positions, span, picture)


def _positions(tokens: int, start: int, picture: PatchedImage | None) -> tuple[NDArray[np.int64], int]:
    """Text counts on in all three axes; a picture is a grid at its start, then text goes on after its longer side."""
    if picture is None:
        return np.tile(np.arange(tokens), (3, 1)), tokens
    rows, columns = (extent // 2 for extent in picture.grid_thw[1:])
    grid = np.stack([np.zeros(rows * columns, np.int64), *np.indices((rows, columns)).reshape(2, -1)])
    after = start + max(rows, columns)
    rest = tokens - start - rows * columns
    before, behind = np.tile(np.arange(start), (3, 1)), np.tile(np.arange(rest), (3, 1)) + after
    return np.concatenate([before, grid + start, behind], axis=1), after + rest


def last_token_of(tokenizer: Tokenizer, text: str, spans: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """For each named character span of the text, the index of the token that ends it."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return {
        name: max(index for index, (start, stop) in enumerate(offsets) if start < end and stop > begin)
        for name, (begin, end) in spans.items()
    }


def collate(parts: Sequence[Part]) -> Batch:
    """The parts, padded on the right and stacked."""
    longest = max(len(part.ids) for part in parts)
    ids = torch.zeros(len(parts), longest, dtype=torch.long)
    positions = torch.zeros(3, len(parts), longest, dtype=torch.long)
    words = torch.full((len(parts), longest), IGNORED)
    verdicts = torch.full((len(parts), longest), float(IGNORED))
    for row, part in enumerate(parts):
        ids[row, : len(part.ids)] = torch.tensor(part.ids)
        positions[:, row, : len(part.ids)] = torch.from_numpy(part.positions)
        for index, word in part.words.items():
            words[row, index] = word
        for index, verdict in part.verdicts.items():
            verdicts[row, index] = verdict
    pictures = [part.picture for part in parts if part.picture is not None]
    return Batch(
        ids=ids,
        positions=positions,
        lengths=torch.tensor([len(part.ids) for part in parts]),
        spans=torch.tensor([part.span for part in parts]),
        grids=torch.tensor([int(part.picture is not None) for part in parts]),
        pixel_values=torch.from_numpy(np.concatenate([p.pixel_values for p in pictures])) if pictures else None,
        grid_thw=torch.tensor([p.grid_thw for p in pictures]) if pictures else None,
        words=words,
        verdicts=verdicts,
    )


# Training forward passes: parts run one after the other over a shared key-value cache. The same numbers as one pass
# over the whole prompt (tested). The constant head is run once a step and a query once for all its documents, which
# makes the long official prompt nearly free.


@dataclass(frozen=True)
class Past:
    """What later parts see. `mask` [n, tokens] marks real tokens, `start` [n] is the next position."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor
    start: torch.Tensor

    def repeated(self, times: int) -> Past:
        """Each row `times` times, neighbours together."""
        layers = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.layers]
        return Past(layers, self.mask.repeat_interleave(times, 0), self.start.repeat_interleave(times, 0))


def empty_past() -> Past:
    """The past of the first part."""
    return Past([], torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def run_part(model: Qwen3VLForConditionalGeneration, batch: Batch, past: Past) -> tuple[torch.Tensor, Past]:
    """The final hidden states [n, t, hidden] of a part behind its past, and the past with it."""
    tokens = batch.ids.shape[1]
    real = (torch.arange(tokens)[None, :] < batch.lengths[:, None]).long()
    mask = torch.cat([past.mask, real], dim=1)
    cache = DynamicCache()
    for index, (keys, values) in enumerate(past.layers):
        cache.update(keys, values, index)
    output = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions + past.start[None, :, None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **_pictures(batch),
    )
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return output.last_hidden_state, Past(layers, mask, past.start + batch.spans)


def last_hidden(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[n, hidden]: the state of each row's last real token."""
    return hidden[torch.arange(len(hidden)), batch.lengths - 1]


def word_loss(model: Qwen3VLForConditionalGeneration, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the words asked for (zero when none are)."""
    asked = batch.words != IGNORED
    if not asked.any():
        return hidden.sum() * 0
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]), batch.words[asked])


def _pictures(batch: Batch) -> dict[str, Any]:
    if batch.pixel_values is None:
        return {}
    return {"pixel_values": batch.pixel_values, "image_grid_thw": batch.grid_thw}
