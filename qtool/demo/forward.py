"""Training forward passes: parts run one after the other over a shared key-value cache.

Rule: the same numbers as one pass over the whole prompt (tested). The constant head is run once a step and a query once
for all its documents, which makes the long official prompt nearly free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, Qwen3VLForConditionalGeneration

from qtool.demo.encoding import IGNORED, Batch


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
