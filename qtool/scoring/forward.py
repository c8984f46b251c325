"""Forward passes: parts of prompts in, the hidden state of each one's last token or a memory of all out.

Rule: padding, batch mates and where a prompt is parted never show in the result; each distinct picture of a pass is
encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD
from qtool.errors import ModelError
from qtool.scoring.memory import Continuation, Memory
from qtool.scoring.spans import Span

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.scoring.model import LoadedModel
    from qtool.scoring.prompt import Prompt
    from qtool.scoring.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Forward:
    """The base model on its device; `picture_tokens` (image, video) are none where the model reads text only."""

    base: Any
    device: torch.device
    picture_tokens: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel, tokenizer: PromptTokenizer, device: torch.device) -> Forward:
        """Move the model to `device` and check that config and tokenizer agree on the picture tokens."""
        picture_tokens = tuple(_picture_tokens(loaded.config, tokenizer))
        if getattr(loaded.base, "has_sliding_layers", False):
            raise ModelError(
                "config.json asks for sliding window attention, which no published model of the family has."
            )
        return cls(loaded.base.to(device), device, picture_tokens)

    @property
    def nothing_read(self) -> Memory:
        """Where the first part of a prompt goes on from."""
        return Memory.empty(self.device)

    def span(self, prompt: Prompt) -> Span:
        """The whole prompt, ready to be parted."""
        return Span.whole(prompt, self.picture_tokens)

    @torch.inference_mode()
    def remember(self, spans: Sequence[Span], parents: Sequence[int], memory: Memory) -> Memory:
        """A memory with a row for each span, which goes on from the row of `memory` that `parents` names."""
        rows = self._tensor(parents)
        if not any(len(span) for span in spans):
            return memory.select(rows)
        cache = Continuation(memory, rows, keep=True)
        real = self._real(spans)
        self._read(spans, real, cache)
        return cache.grown(real)

    @torch.inference_mode()
    def last_hidden(self, spans: Sequence[Span], parents: Sequence[int], memory: Memory) -> torch.Tensor:
        """Final normed hidden states [n, hidden] at the last token; the spans are as in `remember`, and not empty."""
        cache = Continuation(memory, self._tensor(parents), keep=False)
        hidden = self._read(spans, self._real(spans), cache)
        rows: torch.Tensor = hidden[range(len(spans)), [len(span) - 1 for span in spans]]
        return rows

    def _read(self, spans: Sequence[Span], real: torch.Tensor, cache: Continuation) -> torch.Tensor:
        ids = self._padded([span.ids for span in spans])
        positions = self._padded([span.positions for span in spans])
        text = self.base.language_model if self.picture_tokens else self.base
        hidden: torch.Tensor = text(
            position_ids=positions.transpose(0, 1) if self.picture_tokens else positions[:, 0],
            attention_mask=cache.mask(real),
            past_key_values=cache,
            use_cache=False,
            **self._embedded(spans, text.get_input_embeddings()(ids)),
        ).last_hidden_state
        return hidden

    def _embedded(self, spans: Sequence[Span], embeds: torch.Tensor) -> dict[str, Any]:
        pictures = {id(picture): picture for span in spans for picture in span.pictures}
        if not pictures:
            return {"inputs_embeds": embeds}
        pixels = torch.from_numpy(np.concatenate([picture.pixel_values for picture in pictures.values()]))
        grid = self._tensor([picture.grid_thw for picture in pictures.values()])
        seen = self.base.get_image_features(pixels.to(self.device), grid, return_dict=True)
        rows = self._tensor(_feature_rows(spans))
        where = self._padded([span.is_picture for span in spans])
        return {
            "inputs_embeds": embeds.masked_scatter(where[..., None], torch.cat(seen.pooler_output)[rows]),
            "visual_pos_masks": where,
            "deepstack_visual_embeds": [features[rows] for features in seen.deepstack_features],
        }

    def _real(self, spans: Sequence[Span]) -> torch.Tensor:
        return self._padded([np.ones(len(span), dtype=np.bool_) for span in spans])

    def _padded(self, arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        width = max(array.shape[-1] for array in arrays)
        padded = np.zeros((len(arrays), *arrays[0].shape[:-1], width), dtype=arrays[0].dtype)
        for row, array in zip(padded, arrays, strict=True):
            row[..., : array.shape[-1]] = array
        return torch.from_numpy(padded).to(self.device)

    def _tensor(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


def _picture_tokens(config: Any, tokenizer: PromptTokenizer) -> Iterator[int]:
    for field, token in (("image_token_id", IMAGE_PAD), ("video_token_id", VIDEO_PAD)):
        declared: int | None = getattr(config, field, None)
        if declared is not None:
            if declared != (own := tokenizer.token_id(token)):
                raise ModelError(f"config.json: {field} is {declared}, the tokenizer's {token} is {own}.")
            yield declared


def _feature_rows(spans: Sequence[Span]) -> list[int]:
    """For each picture token of the spans, its row among the features of the distinct pictures."""
    starts: dict[int, int] = {}
    rows: list[int] = []
    encoded = 0
    for picture in (picture for span in spans for picture in span.pictures):
        if id(picture) not in starts:
            starts[id(picture)] = encoded
            encoded += picture.placeholder_tokens
        start = starts[id(picture)]
        rows.extend(range(start, start + picture.placeholder_tokens))
    return rows
